//! The exact state of a whole stream as bytes, for state files that must go on bit-identically: unlike
//! [`Planner::export`] it keeps slots, arrival numbers and the rows of removed tokens.
#![forbid(unsafe_code)]

use super::stream::{ExactRow, Held, StreamState};
use super::Planner;
use crate::error::{Error, Result, Status};
use crate::plan::CELLS_PER_WORD;

const VERSION: u32 = 3;
const HEADER_BYTES: usize = 8 * 4;
const SLOT_BYTES: usize = 4 + 4 + 8 + 4;
const PAGE_BYTES: usize = 8 + 4;
const ENCODED: u32 = 1;
const PINNED: u32 = 2;
const NO_CELL: u32 = u32::MAX;
/// Arrival numbers stay far from overflow.
const MAX_STAMP: u64 = 1 << 62;

impl Planner {
    /// Bytes of a [`Planner::snapshot`], the same for every state.
    pub fn snapshot_bytes(&self) -> usize {
        let n_pages = self.config.n_pages();
        HEADER_BYTES
            + 8
            + self.n_slots * SLOT_BYTES
            + n_pages * (PAGE_BYTES + self.config.page / 8)
            + self.config.n_cells * 4
    }

    /// The state of a stream.
    ///
    /// Layout, little-endian: version, `n_cells`, page, window, `sink_tokens`, most sink tokens, `seal_lag`, `n_slots`
    /// (u32 each); next stamp (u64); per slot: cell or 2^32 - 1 (u32), 1 if encoded + 2 if pinned (u32), stamp (u64),
    /// sequence (u32); per page: stamp of its newest row (u64), number of rows that its parameters were made from (u32);
    /// sealed cells, a bit each, in u32 words; per cell: by how much the rows of its page have moved (i32).
    pub fn snapshot(&self, stream: usize) -> Result<Vec<u8>> {
        self.check_stream(stream)?;
        let state = &self.streams[stream];
        let mut out = self.snapshot_header();
        out.extend(state.next_stamp.to_le_bytes());
        for row in &state.exact {
            let (cell, flags, stamp, seq) = row.map_or((NO_CELL, 0, 0, 0), |row| {
                (row.cell, ENCODED * u32::from(row.encoded) + PINNED * u32::from(row.pinned), row.stamp, row.seq)
            });
            out.extend(cell.to_le_bytes());
            out.extend(flags.to_le_bytes());
            out.extend(stamp.to_le_bytes());
            out.extend(seq.to_le_bytes());
        }
        for page in &state.pages {
            out.extend(page.newest.to_le_bytes());
            out.extend((page.n_fitted as u32).to_le_bytes());
        }
        state.sealed_bits.iter().for_each(|word| out.extend(word.to_le_bytes()));
        state.turned.iter().for_each(|distance| out.extend(distance.to_le_bytes()));
        Ok(out)
    }

    /// Makes a stream what it was when `bytes` was taken, by a planner of the same configuration but for the number of
    /// streams. [`Status::Format`], with nothing changed, if the bytes are not that or describe an impossible state.
    pub fn restore(&mut self, stream: usize, bytes: &[u8]) -> Result<()> {
        self.check_stream(stream)?;
        if bytes.len() != self.snapshot_bytes() || bytes[..HEADER_BYTES] != self.snapshot_header()[..] {
            return Err(malformed("the planner state is of another version or configuration"));
        }
        let state = StreamState::parse(StreamState::new(self.config), &bytes[HEADER_BYTES..])?;
        self.streams[stream] = state;
        Ok(())
    }

    /// Makes `cells` readable from their pages, whose bytes the caller has put there and whose rows have moved by `turned`
    /// since they were encoded. Whatever was held for the cells of those pages is forgotten. Fails, with nothing changed,
    /// if a cell does not exist or occurs twice, or the rows of a page have moved by too many distances.
    pub fn adopt(&mut self, stream: usize, cells: &[u32], turned: &[i32]) -> Result<()> {
        self.check_stream(stream)?;
        if turned.len() != cells.len() {
            return Err(Error::invalid(format!("{} distances for {} cells", turned.len(), cells.len())));
        }
        self.check_cells(cells.iter().copied())?;
        let page = self.config.page;
        let mut pages: Vec<usize> = cells.iter().map(|&cell| cell as usize / page).collect();
        pages.sort_unstable();
        pages.dedup();
        let rows: Vec<(usize, i32)> = cells.iter().map(|&cell| cell as usize).zip(turned.iter().copied()).collect();
        self.streams[stream].adopt_turned(&rows)?;
        self.drop_dead(stream, &|cell| pages.binary_search(&(cell / page)).is_err())?;
        let state = &mut self.streams[stream];
        pages.iter().for_each(|&page| state.pages[page].n_fitted = 0);
        for &cell in cells {
            state.seal(cell as usize);
            state.pages[cell as usize / page].n_fitted += 1;
        }
        Ok(())
    }

    fn snapshot_header(&self) -> Vec<u8> {
        let config = &self.config;
        let fields = [config.n_cells, config.page, config.window, config.sink_tokens, config.max_sinks()];
        let fields = fields.into_iter().chain([config.seal_lag, self.n_slots]).map(|field| field as u32);
        std::iter::once(VERSION).chain(fields).flat_map(u32::to_le_bytes).collect()
    }
}

impl StreamState {
    /// Fills an empty state from bytes of the right length.
    fn parse(mut self, bytes: &[u8]) -> Result<Self> {
        let (next_stamp, bytes) = bytes.split_at(8);
        let (slots, bytes) = bytes.split_at(self.n_slots * SLOT_BYTES);
        let (pages, bytes) = bytes.split_at(self.pages.len() * PAGE_BYTES);
        let (bits, turned) = bytes.split_at(self.sealed_bits.len() * 4);
        self.next_stamp = u64_of(next_stamp);
        let possible = |stamp: u64| stamp < self.next_stamp.max(1);
        for (page, bytes) in self.pages.iter_mut().zip(pages.chunks_exact(PAGE_BYTES)) {
            (page.newest, page.n_fitted) = (u64_of(bytes), u32_of(&bytes[8..]) as usize);
        }
        if self.next_stamp > MAX_STAMP || !self.pages.iter().all(|page| possible(page.newest)) {
            return Err(malformed("the planner state has impossible arrival numbers"));
        }
        if self.pages.iter().any(|page| page.n_fitted > self.config.page) {
            return Err(malformed("the planner state has pages made from more rows than fit"));
        }
        let sealed = |cell: usize| u32_of(&bits[cell / CELLS_PER_WORD * 4..]) >> (cell % CELLS_PER_WORD) & 1 == 1;
        for cell in (0..bits.len() * 8).filter(|&cell| sealed(cell)) {
            if cell >= self.held.len() {
                return Err(malformed("the planner state has sealed cells behind the last one"));
            }
            self.seal(cell);
        }
        for (slot, bytes) in slots.chunks_exact(SLOT_BYTES).enumerate() {
            let flags = u32_of(&bytes[4..]);
            let (encoded, pinned) = (flags & ENCODED != 0, flags & PINNED != 0);
            let row = ExactRow {
                cell: u32_of(bytes),
                encoded,
                pinned,
                stamp: u64_of(&bytes[8..]),
                seq: u32_of(&bytes[16..]),
            };
            self.parse_slot(slot, flags, row)?;
        }
        self.parse_order()?;
        self.take_turned(turned.chunks_exact(4).map(|bytes| u32_of(bytes) as i32).collect())
            .map_err(|error| malformed(error.message()))?;
        Ok(self)
    }

    fn parse_slot(&mut self, slot: usize, flags: u32, row: ExactRow) -> Result<()> {
        if (row.cell, flags, row.stamp, row.seq) == (NO_CELL, 0, 0, 0) {
            return Ok(());
        }
        let cell = row.cell as usize;
        let is_free = self.held.get(cell) == Some(&Held::Empty);
        let exists = (row.seq as usize) < self.config.n_seq_max;
        if !is_free || !exists || flags >= ENCODED + PINNED || row.stamp >= self.next_stamp {
            return Err(malformed("the planner state has an impossible exact row"));
        }
        self.exact[slot] = Some(row);
        self.held[cell] = Held::Exact(slot as u32);
        self.pages[cell / self.config.page].n_exact += 1;
        self.n_pinned += usize::from(row.pinned);
        Ok(())
    }

    /// What follows from the exact rows: their order of arrival.
    fn parse_order(&mut self) -> Result<()> {
        let mut stamps: Vec<(u64, u32, bool)> = Vec::new();
        for (slot, row) in self.exact.iter().enumerate() {
            stamps.extend(row.map(|row| (row.stamp, slot as u32, row.pinned)));
        }
        stamps.sort_unstable();
        if stamps.windows(2).any(|pair| pair[0].0 == pair[1].0) || self.n_pinned > self.config.max_sinks() {
            return Err(malformed("the planner state has two rows that arrived as one, or too many sink tokens"));
        }
        self.order.extend(stamps.iter().filter(|(_, _, pinned)| !pinned).map(|&(_, slot, _)| slot));
        Ok(())
    }
}

fn u32_of(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn u64_of(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
}

fn malformed(text: &str) -> Error {
    Error::new(Status::Format, text)
}

#[cfg(test)]
#[path = "tests/snapshot.rs"]
mod tests;
