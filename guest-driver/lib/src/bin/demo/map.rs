// SPDX-License-Identifier: MIT OR Apache-2.0
//! The map of residency: one cell for each page, or for each group of pages where they are many.
//!
//! A cell is a letter. With colours it is a letter in the colour of its background: one sees a solid
//! cell, and what is copied from the terminal is still the map.

use crate::{figures, terminal::Terminal};
use farfault::{PAGE_SIZE, PageState, Pages, Place};

const MAX_ROWS: usize = 8;
const MAX_CELLS_PER_ROW: usize = 128;

/// Columns before the cells: an indent, twelve digits of address, and a gap.
const MARGIN: usize = 16;

/// Where a page is, or all pages of a group are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// There is no page: nobody has touched the memory.
    Nothing,
    /// In RAM, and the GPU would fault.
    Ram,
    /// In RAM, and the GPU has it mapped there.
    RamMapped,
    /// In VRAM.
    Vram,
    /// Pages of a group differ.
    Mixed,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::Ram,
        Self::RamMapped,
        Self::Vram,
        Self::Mixed,
        Self::Nothing,
    ];

    fn of_page(page: &PageState) -> Self {
        match (page.cpu.place, page.gpu.place) {
            (Place::Vram, _) => Self::Vram,
            (Place::Ram, Place::None) => Self::Ram,
            (Place::Ram, _) => Self::RamMapped,
            (Place::None, _) => Self::Nothing,
        }
    }

    fn of_group(pages: &[PageState]) -> Self {
        let mut kinds = pages.iter().map(Self::of_page);
        let first = kinds.next().unwrap_or(Self::Nothing);
        if kinds.all(|kind| kind == first) {
            first
        } else {
            Self::Mixed
        }
    }

    fn letter(self) -> &'static str {
        match self {
            Self::Nothing => ".",
            Self::Ram => "R",
            Self::RamMapped => "G",
            Self::Vram => "V",
            Self::Mixed => "x",
        }
    }

    /// Foreground and background (SGR).
    fn rendition(self) -> &'static str {
        match self {
            Self::Nothing => "2",
            Self::Ram => "34;44",
            Self::RamMapped => "36;46",
            Self::Vram => "32;42",
            Self::Mixed => "33;43",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "of nothing yet",
            Self::Ram => "in RAM",
            Self::RamMapped => "in RAM, mapped on the GPU",
            Self::Vram => "in VRAM",
            Self::Mixed => "mixed: the pages of the cell differ",
        }
    }
}

/// How many of a range's pages are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Census {
    pub(crate) nothing: usize,
    pub(crate) ram: usize,
    pub(crate) ram_mapped: usize,
    pub(crate) vram: usize,
}

impl Census {
    pub(crate) fn of(pages: &[PageState]) -> Self {
        let mut census = Self::default();
        for page in pages {
            match Kind::of_page(page) {
                Kind::Nothing => census.nothing += 1,
                Kind::Ram => census.ram += 1,
                Kind::RamMapped => census.ram_mapped += 1,
                // One page is never mixed.
                Kind::Vram | Kind::Mixed => census.vram += 1,
            }
        }
        census
    }

    fn pages(&self, kind: Kind) -> Option<usize> {
        match kind {
            Kind::Nothing => Some(self.nothing),
            Kind::Ram => Some(self.ram),
            Kind::RamMapped => Some(self.ram_mapped),
            Kind::Vram => Some(self.vram),
            Kind::Mixed => None,
        }
    }
}

/// Pages of one cell, and cells of one row: both powers of two, so that rows begin at round
/// addresses.
fn shape(pages: usize, width: usize) -> (usize, usize) {
    let room = width.saturating_sub(MARGIN).clamp(8, MAX_CELLS_PER_ROW);
    let cells_per_row = 1 << room.ilog2();
    let pages_per_cell = pages
        .div_ceil(cells_per_row * MAX_ROWS)
        .max(1)
        .next_power_of_two();
    (pages_per_cell, cells_per_row)
}

/// The map's lines, and below them its legend.
pub(crate) fn render(terminal: &Terminal, pages: Pages, states: &[PageState]) -> Vec<String> {
    let (pages_per_cell, cells_per_row) = shape(states.len(), terminal.width());
    let cells: Vec<Kind> = states.chunks(pages_per_cell).map(Kind::of_group).collect();
    let row_bytes = cells_per_row * pages_per_cell * PAGE_SIZE;
    let mut lines = Vec::new();
    for (index, row) in cells.chunks(cells_per_row).enumerate() {
        let address = format!("{:012x}", pages.address() + index * row_bytes);
        lines.push(format!(
            "  {}  {}",
            terminal.dim(&address),
            paint(terminal, row)
        ));
    }
    lines.push(String::new());
    lines.extend(legend(terminal, &cells, &Census::of(states)));
    let cell = (pages_per_cell * PAGE_SIZE) as u64;
    lines.push(format!("  {:<10}  {}", "one cell", figures::bytes(cell)));
    lines
}

/// One row; neighbours of a kind share their escape sequences.
fn paint(terminal: &Terminal, row: &[Kind]) -> String {
    row.chunk_by(|a, b| a == b)
        .filter_map(|run| Some((run.first()?, run.len())))
        .map(|(kind, length)| terminal.sgr(kind.rendition(), &kind.letter().repeat(length)))
        .collect()
}

/// What the letters mean that the map has, and how much is there: a line for each.
fn legend(terminal: &Terminal, cells: &[Kind], census: &Census) -> Vec<String> {
    let line = |kind: Kind| {
        let pages = census.pages(kind);
        if pages.unwrap_or(0) == 0 && !cells.contains(&kind) {
            return None;
        }
        let size = pages.map(|pages| figures::bytes((pages * PAGE_SIZE) as u64) + " ");
        let sample = terminal.sgr(kind.rendition(), kind.letter());
        let text = size.unwrap_or_default() + kind.name();
        Some(format!("  {sample}{:<9}  {text}", ""))
    };
    Kind::ALL.into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use farfault::{Advice, View};

    fn page(cpu: Place, gpu: Place) -> PageState {
        let view = |place| View {
            place,
            write: true,
            huge: false,
            atomic: false,
            accessed: false,
            dirty: false,
            vram: None,
        };
        PageState {
            cpu: view(cpu),
            gpu: view(gpu),
            advice: Advice::Default,
        }
    }

    fn range(count: usize) -> Pages {
        Pages::new(0x7f00_0000_0000..0x7f00_0000_0000 + count * PAGE_SIZE).unwrap()
    }

    fn plain(states: &[PageState], width: usize) -> Vec<String> {
        render(&Terminal::with(false, width), range(states.len()), states)
    }

    #[test]
    fn map_of_each_kind_has_its_letter() {
        let states = [
            page(Place::None, Place::None),
            page(Place::Ram, Place::None),
            page(Place::Ram, Place::Ram),
            page(Place::Vram, Place::Vram),
            page(Place::Vram, Place::None),
        ];
        let lines = plain(&states, 80);
        assert_eq!(lines[0], "  7f0000000000  .RGVV");
        let legend = [
            "  R           4 KiB in RAM",
            "  G           4 KiB in RAM, mapped on the GPU",
            "  V           8 KiB in VRAM",
            "  .           4 KiB of nothing yet",
            "  one cell    4 KiB",
        ];
        assert_eq!(lines[2..], legend);
    }

    #[test]
    fn map_in_color_has_the_same_letters() {
        let states = [
            page(Place::Vram, Place::Vram),
            page(Place::Ram, Place::None),
        ];
        let colored = &render(&Terminal::with(true, 80), range(2), &states)[0];
        assert!(
            colored.ends_with("\x1b[32;42mV\x1b[0m\x1b[34;44mR\x1b[0m"),
            "{colored:?}"
        );
    }

    #[test]
    fn map_of_group_that_differs_is_mixed() {
        let mut states = vec![page(Place::Ram, Place::None); 64 * 8 * 2];
        states[1] = page(Place::Vram, Place::Vram);
        let lines = plain(&states, 80);
        assert!(lines[0].starts_with("  7f0000000000  xRRR"), "{}", lines[0]);
        assert!(
            lines
                .iter()
                .any(|line| line == "  V           4 KiB in VRAM"),
            "{lines:?}"
        );
        assert!(
            lines
                .iter()
                .any(|line| line.starts_with("  x           mixed")),
            "{lines:?}"
        );
    }

    #[test]
    fn map_fits_every_width_and_eight_rows() {
        for width in [32, 40, 79, 80, 81, 132, 500] {
            for pages in [1, 2, 511, 512, 2048, 16384, 16385] {
                let states = vec![page(Place::Ram, Place::None); pages];
                let lines = plain(&states, width);
                let rows: Vec<_> = lines.iter().take_while(|line| !line.is_empty()).collect();
                assert!(rows.len() <= MAX_ROWS, "{pages} pages, {width} columns");
                assert!(
                    rows.iter().all(|row| row.len() <= width),
                    "{pages}, {width}"
                );
            }
        }
    }

    #[test]
    fn shape_of_64_mib_on_80_columns_is_round() {
        assert_eq!(shape(16384, 80), (32, 64));
        assert_eq!(shape(1, 80), (1, 64));
    }

    #[test]
    fn census_counts_each_page_once() {
        let states = [
            page(Place::Ram, Place::Ram),
            page(Place::Ram, Place::None),
            page(Place::Vram, Place::None),
        ];
        let census = Census::of(&states);
        assert_eq!(
            (census.ram, census.ram_mapped, census.vram, census.nothing),
            (1, 1, 1, 0)
        );
    }
}
