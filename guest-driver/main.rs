// SPDX-License-Identifier: GPL-2.0
//! `farfault.ko`: the Linux driver of the Farfault GPU.
//!
//! | layer | what it knows |
//! | --- | --- |
//! | `file`, `dmirror` | what user space may ask |
//! | `svm` | mirrors, faults, migration, eviction |
//! | `gpu`, `contexts`, `vram`, `queue` | the device, who owns its memory, requests and answers |
//! | `kapi` | safe wrappers of the kernel's C |
//! | `bindings` | the C itself |
//!
//! A layer uses those below it. `unsafe` is in the last two and nowhere else.
#![deny(unsafe_code)]

mod bindings;
mod contexts;
mod dmirror;
mod file;
mod gpu;
mod kapi;
mod queue;
mod sort;
mod stats;
mod svm;
#[path = "lib/src/uapi.rs"]
pub mod uapi;
mod vram;

use crate::{
    dmirror::OpenMirror,
    file::OpenFile,
    gpu::{Gpu, Interrupts, QUEUES},
    kapi::{
        chardev::Chardev,
        virtio::{self, Device},
        virtqueue::Queues,
    },
};
use farfault_protocol::config::VIRTIO_ID;
use kernel::{
    debugfs::Scope,
    device::{Bound, Core},
    driver::Registration,
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

virtio_device_table!(TABLE, MODULE_TABLE, [VIRTIO_ID]);

/// A GPU in use: when this goes, it is stopped.
struct Running(Arc<Gpu>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What a bound device has, in the order in which it goes.
#[pin_data]
struct BoundGpu<'bound> {
    #[pin]
    debugfs: Scope<Arc<Gpu>>,
    mirror: Option<Pin<KBox<Chardev<OpenMirror>>>>,
    #[pin]
    chardev: Chardev<OpenFile>,
    running: Running,
    /// `None` while the machine sleeps.
    #[pin]
    queues: Mutex<Option<GpuQueues<'bound>>>,
}

type GpuQueues<'bound> = Pin<KBox<Queues<'bound, Interrupts, QUEUES>>>;

fn find_queues<'bound>(device: &'bound Device<Bound>, gpu: &Arc<Gpu>) -> Result<GpuQueues<'bound>> {
    let names = [c"control", c"submit", c"event"];
    let queues = Queues::new(device, names, Ok::<_, Error>(gpu.interrupts()));
    KBox::pin_init(queues, GFP_KERNEL)
}

/// The GPU's second node, if it is to have one.
fn dmirror_node(gpu: &Arc<Gpu>) -> Result<Option<Pin<KBox<Chardev<OpenMirror>>>>> {
    if *module_parameters::dmirror.value() == 0 {
        return Ok(None);
    }
    let node = Chardev::new(&dmirror::KIND, 0o600, gpu.clone());
    match KBox::pin_init(node, GFP_KERNEL) {
        Ok(node) => Ok(Some(node)),
        // The other GPUs have none.
        Err(error) if error == ENOSPC => Ok(None),
        Err(error) => Err(error),
    }
}

struct Driver;

impl virtio::Driver for Driver {
    type Data<'bound> = BoundGpu<'bound>;
    const ID_TABLE: virtio::IdTable = &TABLE;
    const FEATURES: &'static [u32] = &[virtio::F_VERSION_1];

    fn probe<'bound>(
        device: &'bound Device<Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        let device: &'bound Device<Bound> = device;
        pin_init::pin_init_scope(move || {
            let gpu = Gpu::new(device)?;
            let shared = gpu.clone();
            let found = find_queues(device, &gpu)?;
            // If anything fails from here on, it stops the GPU while there are queues.
            let running = Running(gpu.clone());
            gpu.start(&found)?;
            Ok(try_pin_init!(BoundGpu {
                queues <- new_mutex!(Some(found)),
                running,
                mirror: dmirror_node(&gpu)?,
                chardev <- Chardev::new(&file::KIND, 0o666, shared.clone()),
                debugfs <- Scope::dir(shared, chardev.name(), |gpu, dir| {
                    dir.read_callback_file(c"stats", gpu, &|gpu, f| gpu.write_stats(f));
                }),
            }? Error))
        })
    }

    fn unbind<'bound>(_: &'bound Device<Core<'_>>, data: Pin<&Self::Data<'bound>>) {
        data.running.0.stop();
        if let Some(queues) = &*data.queues.lock() {
            queues.reset();
        }
    }

    fn freeze<'bound>(_: &'bound Device<Core<'_>>, data: Pin<&Self::Data<'bound>>) -> Result {
        data.running.0.suspend()?;
        let queues = data.queues.lock().take();
        drop(queues);
        Ok(())
    }

    fn restore<'bound>(device: &'bound Device<Core<'_>>, data: Pin<&Self::Data<'bound>>) -> Result {
        let device: &'bound Device<Bound> = device;
        let gpu = &data.running.0;
        let lost =
            |error: &Error| gpu.lose("it did not come back from the machine's sleep", *error);
        let found = find_queues(device, gpu).inspect_err(lost)?;
        gpu.resume(&found).inspect_err(lost)?;
        *data.queues.lock() = Some(found);
        Ok(())
    }
}

#[pin_data]
struct Module {
    #[pin]
    driver: Registration<virtio::Adapter<Driver>>,
}

impl kernel::InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            driver <- Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
        })
    }
}

module! {
    type: Module,
    name: "farfault",
    authors: ["The Farfault authors"],
    description: "Driver of the Farfault virtual GPU",
    license: "GPL",
    params: {
        time_limit: u16 {
            default: 20,
            description: "Seconds that the device has to answer a request before it counts as lost",
        },
        least_stay: u16 {
            default: 2,
            description: "Milliseconds that 2 MiB stay in VRAM at least before they make room for others",
        },
        dmirror: u8 {
            default: 0,
            description: "1: the first two GPUs also have /dev/hmm_dmirror0 and 1, with the ioctls of lib/test_hmm_uapi.h",
        },
    },
}
