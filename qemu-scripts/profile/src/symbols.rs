// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which function of the kernel an address is in: `/proc/kallsyms`.

use std::{fs, io};

const LIST: &str = "/proc/kallsyms";

/// The functions, by address.
pub(crate) struct Symbols(Vec<Symbol>);

struct Symbol {
    start: u64,
    name: String,
    /// Empty, or with a space and brackets.
    module: String,
}

impl Symbols {
    /// Those of the running kernel and its modules.
    pub(crate) fn of_the_kernel() -> io::Result<Self> {
        let symbols = Self::parse(&fs::read_to_string(LIST)?);
        match symbols.0.last() {
            Some(last) if last.start != 0 => Ok(symbols),
            _ => Err(io::Error::other(format!(
                "{LIST} shows no addresses: it takes root"
            ))),
        }
    }

    /// Lines of `address kind name [module]`; data is left out.
    pub(crate) fn parse(list: &str) -> Self {
        let symbol = |line: &str| {
            let mut words = line.split_whitespace();
            let start = u64::from_str_radix(words.next()?, 16).ok()?;
            let is_code = matches!(words.next()?, "t" | "T" | "w" | "W");
            let name = rustc_demangle::demangle(words.next()?);
            is_code.then(|| Symbol {
                start,
                name: format!("{name:#}"),
                module: words
                    .next()
                    .map(|module| format!(" {module}"))
                    .unwrap_or_default(),
            })
        };
        let mut symbols: Vec<_> = list.lines().filter_map(symbol).collect();
        symbols.sort_by_key(|symbol| symbol.start);
        Self(symbols)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The number of the function that an address is in.
    pub(crate) fn index(&self, address: u64) -> Option<usize> {
        let after = self.0.partition_point(|symbol| symbol.start <= address);
        after.checked_sub(1)
    }

    /// Its name alone.
    pub(crate) fn name(&self, index: usize) -> &str {
        &self.0[index].name
    }

    /// Its name, and the module that it is in.
    pub(crate) fn shown(&self, index: usize) -> String {
        let Symbol { name, module, .. } = &self.0[index];
        format!("{name}{module}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_of_an_address_is_the_last_function_that_begins_before_it() {
        let symbols =
            Symbols::parse("20 t b [m]\n10 T a\n18 d data\n30 t _RNvCs1234_4main3run [m]\n");
        let shown = |address| symbols.index(address).map(|index| symbols.shown(index));
        assert_eq!(shown(0xf), None);
        assert_eq!(shown(0x10).as_deref(), Some("a"));
        assert_eq!(shown(0x1f).as_deref(), Some("a"));
        assert_eq!(shown(0x20).as_deref(), Some("b [m]"));
        assert_eq!(shown(0xff).as_deref(), Some("main::run [m]"));
    }
}
