// SPDX-License-Identifier: MIT OR Apache-2.0
//! An open GPU.

use crate::{
    error::{CallName, Error, Result},
    job::{self, Scope},
    launch::{Launch, Output},
    pages::Pages,
    sys,
    uapi::{self, Advice, Info, Place, Stats},
};
use rustix::io::Errno;
use std::{
    fs::{File, OpenOptions},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

/// Most pages of one QUERY: a range that is mostly not mapped fails before it costs memory.
const QUERY_PAGES: usize = 1 << 16;

/// A GPU that mirrors this process's address space, until it is dropped. It belongs to the process
/// that opened it: a child opens its own.
#[derive(Debug)]
pub struct Gpu {
    file: File,
    info: Info,
}

/// What [`Gpu::migrate`] did, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Moved now.
    pub moved: u64,
    /// Were there before.
    pub there: u64,
    /// Are elsewhere: they cannot move.
    pub stayed: u64,
}

/// How one of the two, CPU or GPU, has a page in its page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Where it finds it; [`Place::None`]: it would fault. A CPU faults on [`Place::Vram`], too.
    pub place: Place,
    /// It may write.
    pub write: bool,
    /// It is mapped by a 2 MiB entry.
    pub huge: bool,
    /// The GPU may do atomics.
    pub atomic: bool,
    /// The GPU has used it since it was mapped or looked at.
    pub accessed: bool,
    /// The GPU has written it since it was mapped.
    pub dirty: bool,
    /// Where it is in VRAM, if it is there.
    pub vram: Option<u64>,
}

/// Where a page is, as the two see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    /// The CPU's page tables: this is where the data is.
    pub cpu: View,
    /// The GPU's page tables.
    pub gpu: View,
    /// The advice in force.
    pub advice: Advice,
}

impl Gpu {
    /// Opens the GPU of a device node.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let opened = OpenOptions::new().read(true).write(true).open(path);
        let file = opened.map_err(|cause| Error::Open {
            path: path.to_owned(),
            cause,
        })?;
        let info = sys::info(file.as_fd())
            .map_err(|errno| Error::call(CallName::new("INFO"), None, errno))?;
        if info.uapi_version < uapi::UAPI_VERSION {
            return Err(Error::Version {
                path: path.to_owned(),
                driver: info.uapi_version,
                library: uapi::UAPI_VERSION,
            });
        }
        Ok(Self { file, info })
    }

    /// Opens the first GPU that this machine has: that of the lowest number.
    pub fn open_first() -> Result<Self> {
        Self::open(first_node(Path::new("/dev")).ok_or(Error::NoGpu)?)
    }

    /// What it is.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Runs a job and waits for its end.
    pub fn run<T: Output>(&self, launch: Launch<'_, T>) -> Result<T> {
        self.scope(|scope| scope.launch(launch)?.wait())
    }

    /// Runs `body`, which may start jobs that go on while it does, and waits for all of them. As
    /// with [`std::thread::scope`], jobs borrow memory from outside of the scope until it ends.
    ///
    /// ```no_run
    /// # use farfault::{Gpu, Launch};
    /// # fn main() -> farfault::Result<()> {
    /// # let gpu = Gpu::open_first()?;
    /// let (mut ones, twos) = (vec![0u64; 4096], vec![2u64; 4096]);
    /// let sum = gpu.scope(|scope| {
    ///     scope.launch(Launch::fill(&mut ones, 1).waves(8))?;
    ///     scope.launch(Launch::sum(&twos))?.wait()
    /// })?;
    /// assert_eq!((sum, ones[7]), (8192, 1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// That of `body`, or else the first one of the jobs that it did not wait for. If `body` panics,
    /// the jobs that still run are killed.
    pub fn scope<'env, T>(
        &self,
        body: impl for<'scope> FnOnce(Scope<'scope, 'env>) -> Result<T>,
    ) -> Result<T> {
        let max_waves = self.info.max_waves;
        let (result, leftovers) =
            sys::with_jobs(self.as_fd(), |jobs| body(Scope::new(jobs, max_waves)));
        let value = result?;
        for (kernel, end) in leftovers {
            let call = CallName::of_kernel("WAIT", kernel);
            let end = end.map_err(|errno| Error::call(call, None, errno))?;
            job::outcome(kernel, &end)?;
        }
        Ok(value)
    }

    /// Stores `pattern` to each word of `destination`.
    pub fn fill(&self, destination: &mut [u64], pattern: u64) -> Result<()> {
        self.run(Launch::fill(destination, pattern))
    }

    /// Copies `source` to `destination`, which has the same length.
    pub fn copy(&self, destination: &mut [u64], source: &[u64]) -> Result<()> {
        self.run(Launch::copy(destination, source)?)
    }

    /// The sum of the words of `source`, wrapping around.
    pub fn sum(&self, source: &[u64]) -> Result<u64> {
        self.run(Launch::sum(source))
    }

    /// Adds `addend` to each word of `destination`, wrapping around.
    pub fn add(&self, destination: &mut [u64], addend: u64) -> Result<()> {
        self.run(Launch::add(destination, addend))
    }

    /// Adds to a word atomically, towards CPUs, too. Returns what it was before.
    pub fn atomic_add(&self, destination: &AtomicU64, addend: u64) -> Result<u64> {
        self.run(Launch::atomic_add(destination, addend, 1))
    }

    /// Stores `desired` if the word is `expected`, atomically, towards CPUs, too. Returns what it
    /// was before.
    pub fn compare_and_swap(
        &self,
        destination: &AtomicU64,
        expected: u64,
        desired: u64,
    ) -> Result<u64> {
        self.run(Launch::compare_and_swap(destination, expected, desired))
    }

    /// Goes `steps` links along a chain. Returns the address of the link that it came to.
    pub fn pointer_chase(&self, chain: &crate::Chain<'_>, steps: u64) -> Result<u64> {
        self.run(Launch::pointer_chase(chain, steps))
    }

    /// Moves pages to RAM or VRAM. What cannot move stays, and is counted.
    pub fn migrate(&self, pages: impl Into<Pages>, destination: Place) -> Result<Moved> {
        let pages = pages.into();
        let call = CallName::new("MIGRATE");
        if destination == Place::None {
            return Err(Error::Argument {
                call,
                problem: "pages cannot move to nowhere; say Place::Ram or Place::Vram".to_owned(),
            });
        }
        let mut request = uapi::Migrate {
            address: pages.address() as u64,
            length: pages.length() as u64,
            destination: destination.raw(),
            ..uapi::Migrate::default()
        };
        sys::migrate(self.as_fd(), &mut request).map_err(on(call, pages))?;
        Ok(Moved {
            moved: request.moved,
            there: request.there,
            stayed: request.stayed,
        })
    }

    /// Says where pages should be when the GPU wants them. It moves nothing by itself, and stays in
    /// force for these addresses, whatever they hold later.
    pub fn advise(&self, pages: impl Into<Pages>, advice: Advice) -> Result<()> {
        let pages = pages.into();
        let request = uapi::Advise {
            address: pages.address() as u64,
            length: pages.length() as u64,
            advice: advice.raw(),
            reserved: 0,
        };
        sys::advise(self.as_fd(), request).map_err(on(CallName::new("ADVISE"), pages))
    }

    /// Takes pages from the CPU, ahead of jobs that do atomics on them in RAM; pages in VRAM come home
    /// for it. A page that the CPU touches is the CPU's again. Jobs take what they need by themselves.
    ///
    /// # Errors
    ///
    /// On memory that is not private and anonymous ([`Error::is_not_anonymous`]), or may not be
    /// written. Some pages may have been taken, or come home, then.
    pub fn make_exclusive(&self, pages: impl Into<Pages>) -> Result<()> {
        let pages = pages.into();
        let request = uapi::Exclusive {
            address: pages.address() as u64,
            length: pages.length() as u64,
        };
        sys::exclusive(self.as_fd(), request).map_err(on(CallName::new("EXCLUSIVE"), pages))
    }

    /// Where each page is. It moves and maps nothing.
    pub fn query(&self, pages: impl Into<Pages>) -> Result<Vec<PageState>> {
        let mut states = Vec::new();
        for part in pages.into().parts(QUERY_PAGES) {
            let call = CallName::new("QUERY");
            let answers = sys::query(self.as_fd(), part).map_err(on(call, part))?;
            for page in &answers {
                states.push(PageState::parse(page)?);
            }
        }
        Ok(states)
    }

    /// Counts since this GPU was opened.
    pub fn stats(&self) -> Result<Stats> {
        sys::stats(self.as_fd()).map_err(|errno| Error::call(CallName::new("STATS"), None, errno))
    }

    /// Sends an empty command to the GPU and waits for the answer.
    pub fn ping(&self) -> Result<()> {
        sys::ping(self.as_fd()).map_err(|errno| Error::call(CallName::new("PING"), None, errno))
    }
}

/// For `poll`: readable while a job has ended that was not collected.
impl AsFd for Gpu {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl View {
    fn parse(place: u8, flags: u8, vram: u64) -> Result<Self> {
        let place = Place::from_raw(place.into()).ok_or_else(|| answer("place", place))?;
        let has = |flag| flags & flag != 0;
        Ok(Self {
            place,
            write: has(uapi::PAGE_WRITE),
            huge: has(uapi::PAGE_HUGE),
            atomic: has(uapi::PAGE_ATOMIC),
            accessed: has(uapi::PAGE_ACCESSED),
            dirty: has(uapi::PAGE_DIRTY),
            vram: (place == Place::Vram).then_some(vram),
        })
    }
}

impl PageState {
    fn parse(page: &uapi::Page) -> Result<Self> {
        let advice = Advice::from_raw(page.advice.into());
        Ok(Self {
            cpu: View::parse(page.cpu_place, page.cpu_flags, page.cpu_vram)?,
            gpu: View::parse(page.gpu_place, page.gpu_flags, page.gpu_vram)?,
            advice: advice.ok_or_else(|| answer("advice", page.advice))?,
        })
    }
}

fn answer(what: &str, number: u8) -> Error {
    Error::Answer {
        call: CallName::new("QUERY"),
        answer: format!("{what} {number}"),
    }
}

fn on(call: CallName, pages: Pages) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::call(call, Some(pages.range()), errno)
}

/// The `farfaultN` of the lowest number in a folder.
fn first_node(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let numbers = entries.filter_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.strip_prefix("farfault")?.parse::<u32>().ok()
    });
    Some(folder.join(format!("farfault{}", numbers.min()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, pages::PAGE_SIZE};

    /// A descriptor that has none of our calls.
    fn no_gpu() -> Gpu {
        let info = Info {
            max_waves: 4,
            ..Info::default()
        };
        Gpu {
            file: File::open("/dev/null").unwrap(),
            info,
        }
    }

    #[test]
    fn first_node_is_that_of_the_lowest_number() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(first_node(folder.path()), None);
        for name in ["farfault10", "farfault2", "farfaultx", "null"] {
            File::create(folder.path().join(name)).unwrap();
        }
        assert_eq!(
            first_node(folder.path()),
            Some(folder.path().join("farfault2"))
        );
        assert_eq!(first_node(&folder.path().join("none")), None);
    }

    #[test]
    fn open_of_missing_node_names_it() {
        let error = Gpu::open("/dev/farfault-none").unwrap_err();
        assert!(matches!(&error, Error::Open { path, .. } if path.ends_with("farfault-none")));
    }

    #[test]
    fn open_of_other_device_says_that_the_call_is_unknown() {
        let error = Gpu::open("/dev/null").unwrap_err().to_string();
        assert!(
            error.starts_with("INFO failed: the driver has no such call"),
            "{error}"
        );
    }

    #[test]
    fn job_on_other_device_fails_with_kernel_and_address() {
        let mut memory = [0u64; 8];
        let address = format!("{:#x}", memory.as_ptr().addr());
        let error = no_gpu().fill(&mut memory, 1).unwrap_err().to_string();
        assert!(error.starts_with("SUBMIT (fill) on "), "{error}");
        assert!(error.contains(&address), "{error}");
    }

    #[test]
    fn scope_without_jobs_returns_what_its_body_does() {
        assert_eq!(no_gpu().scope(|_| Ok(5)).unwrap(), 5);
        let result = no_gpu().scope(|_| Err::<(), _>(Error::NoGpu));
        assert!(matches!(result, Err(Error::NoGpu)));
    }

    #[test]
    fn migrate_to_nowhere_is_refused() {
        let pages = Pages::new(PAGE_SIZE..2 * PAGE_SIZE).unwrap();
        let error = no_gpu().migrate(pages, Place::None).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }));
    }

    #[test]
    fn page_parsed_has_its_flags_and_places() {
        let page = uapi::Page {
            cpu_place: 2,
            cpu_flags: uapi::PAGE_WRITE | uapi::PAGE_HUGE,
            gpu_place: 0,
            advice: 3,
            cpu_vram: 0x4000,
            ..uapi::Page::default()
        };
        let state = PageState::parse(&page).unwrap();
        assert_eq!(
            (state.cpu.place, state.cpu.vram),
            (Place::Vram, Some(0x4000))
        );
        assert!(state.cpu.write && state.cpu.huge && !state.cpu.dirty);
        assert_eq!((state.gpu.place, state.gpu.vram), (Place::None, None));
        assert_eq!(state.advice, Advice::MapOnly);
    }

    #[test]
    fn page_with_unknown_numbers_is_an_error() {
        let place = uapi::Page {
            gpu_place: 9,
            ..uapi::Page::default()
        };
        let text = PageState::parse(&place).unwrap_err().to_string();
        assert!(text.contains("place 9"), "{text}");
        let advice = uapi::Page {
            advice: 9,
            ..uapi::Page::default()
        };
        assert!(PageState::parse(&advice).is_err());
    }
}
