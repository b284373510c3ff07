//! Saved states: everything needed to go on with bit-identical results.
//!
//! Layout, little-endian, without gaps:
//!
//! | bytes | content |
//! |---|---|
//! | 8 | magic `kvqcache` |
//! | 4 | version of this layout |
//! | 8 | length of the whole state, checksum included |
//! | 4 + n | length and text: canonical recipe, sizes, page format ([`Cache::identity`]) |
//! | 4 per cell | positions |
//! | 8 per cell | sets of sequences |
//! | 8 + n | length and bytes of the planner's stream ([`crate::planner::Planner::snapshot`]) |
//! | per layer, K then V | a bit per block of 4096 bytes of memory, then the blocks whose bit is set; the others are zero |
//! | 4 | CRC-32C of all bytes before it |
//!
//! Rows of removed tokens are wiped from what is written ([`crate::erase`]).
#![forbid(unsafe_code)]

use std::io::{self, Write};

use crc32c::{crc32c, crc32c_append};

use super::cells::Cells;
use super::{Cache, Layer, STREAM};
use crate::codec::page::Side;
use crate::erase::erase_head;
use crate::error::{Error, Result, Status};
use crate::head::Head;
use crate::location::Location;
use crate::planner::Planner;
use crate::pool;

const MAGIC: &[u8; 8] = b"kvqcache";
const VERSION: u32 = 3;
const CHECKSUM_BYTES: usize = 4;
/// Unit in which zeros are left out.
const BLOCK: usize = 4096;

impl Cache {
    /// Bytes that [`Cache::save_memory`] would write now.
    pub fn state_bytes(&self) -> Result<usize> {
        self.check_idle()?;
        let mut n_bytes = self.fixed_bytes();
        self.for_each_live_memory(&mut |memory| {
            let held = memory.chunks(BLOCK).filter(|block| !is_zero(block)).map(<[u8]>::len).sum::<usize>();
            n_bytes += memory.len().div_ceil(BLOCK).div_ceil(8) + held;
            Ok(())
        })?;
        Ok(n_bytes)
    }

    /// Writes the state to the front of `out` and returns its length. [`Status::BufferTooSmall`] if it does not fit.
    pub fn save_memory(&self, out: &mut [u8]) -> Result<usize> {
        let n_bytes = self.state_bytes()?;
        let have = out.len();
        let out = out.get_mut(..n_bytes).ok_or_else(|| {
            Error::new(Status::BufferTooSmall, format!("the state needs {n_bytes} bytes, the buffer has {have}"))
        })?;
        self.save_to(&mut &mut *out)?;
        Ok(n_bytes)
    }

    /// Takes over a state that was saved from a cache of the same recipe and sizes (threads may differ).
    /// [`Status::Format`] for anything else; the cache is then as it was.
    pub fn load_memory(&mut self, bytes: &[u8]) -> Result<()> {
        if self.batch.is_some() {
            self.check_idle()?;
        }
        let state = self.parse(bytes)?;
        self.planner = state.planner;
        self.cells = state.cells;
        let memories = self.layers.iter_mut().flat_map(|layer| [layer.k.bytes_mut(), layer.v.bytes_mut()]);
        for (memory, saved) in memories.zip(state.memories) {
            saved.restore(memory);
        }
        self.broken = false;
        Ok(())
    }

    /// Most bytes that a state of this cache can have.
    pub(super) fn max_state_bytes(&self) -> usize {
        self.fixed_bytes()
            + self.memories().map(|memory| memory.len() + memory.len().div_ceil(BLOCK).div_ceil(8)).sum::<usize>()
    }

    pub(super) fn save_to(&self, out: &mut dyn Write) -> Result<()> {
        let n_bytes = self.state_bytes()?;
        let planner = self.planner.snapshot(STREAM)?;
        let failed = |error: io::Error| Error::new(Status::Io, format!("writing a state: {error}"));
        let mut writer = Writer { out, checksum: 0 };
        self.write_front(&mut writer, n_bytes as u64, &planner).map_err(failed)?;
        self.for_each_live_memory(&mut |memory| write_memory(&mut writer, memory).map_err(failed))?;
        let Writer { out, checksum } = writer;
        out.write_all(&checksum.to_le_bytes()).map_err(failed)
    }

    /// Hands over K and V of each layer without the rows of removed tokens.
    pub(super) fn for_each_live_memory(&self, use_memory: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut location = self.planner.locate(STREAM)?;
        let dead = location.iter_mut().enumerate().filter(|(cell, _)| !self.cells.is_live(*cell));
        dead.for_each(|(_, location)| *location = Location::default());
        let mut copy = Vec::new();
        for Layer { layout, k, v } in &self.layers {
            for (side, memory) in [(Side::Key, k.bytes()), (Side::Value, v.bytes())] {
                copy.clear();
                copy.extend_from_slice(memory);
                for region in copy.chunks_exact_mut(layout.head_bytes(side)) {
                    erase_head(layout, side, region, &location)?;
                }
                use_memory(&copy)?;
            }
        }
        Ok(())
    }

    fn write_front(&self, out: &mut Writer, n_bytes: u64, planner: &[u8]) -> io::Result<()> {
        out.write(MAGIC)?;
        out.write(&VERSION.to_le_bytes())?;
        out.write(&n_bytes.to_le_bytes())?;
        let identity = self.identity();
        out.write(&(identity.len() as u32).to_le_bytes())?;
        out.write(identity.as_bytes())?;
        self.cells.pos().iter().try_for_each(|pos| out.write(&pos.to_le_bytes()))?;
        self.cells.seqs().iter().try_for_each(|seqs| out.write(&seqs.to_le_bytes()))?;
        out.write(&(planner.len() as u64).to_le_bytes())?;
        out.write(planner)
    }

    /// Checks everything and changes nothing.
    fn parse<'a>(&self, bytes: &'a [u8]) -> Result<State<'a>> {
        let mut reader = Reader { bytes };
        if reader.take(MAGIC.len())? != MAGIC {
            return Err(malformed("this is not a saved kvq cache"));
        }
        let version = reader.u32()?;
        if version != VERSION {
            return Err(malformed(format!("the state has version {version}, this library reads {VERSION}")));
        }
        let n_bytes = reader.u64()?;
        if n_bytes != bytes.len() as u64 {
            return Err(malformed(format!("the state says it has {n_bytes} bytes, but {} are here", bytes.len())));
        }
        check_checksum(bytes)?;
        let identity_len = reader.u32()? as usize;
        let (saved, own) = (reader.take(identity_len)?, self.identity());
        if saved != own.as_bytes() {
            let saved = String::from_utf8_lossy(&saved[..saved.len().min(1000)]);
            return Err(malformed(format!("the state is of another cache: it has '{saved}', this one is '{own}'")));
        }
        let n_cells = self.cells.len();
        let pos = reader.take(4 * n_cells)?.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("four")));
        let seqs = reader.take(8 * n_cells)?.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight")));
        let cells = Cells::from_parts(pos.collect(), seqs.collect(), self.params.n_seq_max)?;
        let planner_len = usize::try_from(reader.u64()?).unwrap_or(usize::MAX);
        let planner = self.parse_planner(reader.take(planner_len)?, &cells)?;
        let memories: Vec<SavedMemory> =
            self.memories().map(|memory| SavedMemory::parse(&mut reader, memory.len())).collect::<Result<_>>()?;
        self.check_pools(&memories)?;
        if reader.bytes.len() != CHECKSUM_BYTES {
            return Err(malformed("the state has bytes that belong to nothing"));
        }
        Ok(State { cells, planner, memories })
    }

    fn check_pools(&self, memories: &[SavedMemory]) -> Result<()> {
        let mut memory = Vec::new();
        for (Layer { layout, .. }, saved) in self.layers.iter().zip(memories.chunks_exact(2)) {
            if layout.pool_rows() == 0 {
                continue;
            }
            for (side, saved) in [Side::Key, Side::Value].into_iter().zip(saved) {
                let bytes = layout.head_bytes(side);
                memory.resize(bytes * layout.shape().n_kv_heads as usize, 0);
                saved.restore(&mut memory);
                memory.chunks_exact(bytes).try_for_each(|region| pool::check(Head::new(layout, side, region)))?;
            }
        }
        Ok(())
    }

    fn parse_planner(&self, bytes: &[u8], cells: &Cells) -> Result<Planner> {
        let mut planner = Planner::new(*self.planner.config())?;
        planner.restore(STREAM, bytes)?;
        let location = planner.locate(STREAM)?;
        if (0..cells.len()).any(|cell| cells.is_live(cell) && !location[cell].is_held()) {
            return Err(malformed("the state has tokens without rows"));
        }
        if self.rotation.is_none() && location.iter().any(|location| location.turned != 0) {
            return Err(malformed("the state has keys that moved, but this cache does not know how they turn"));
        }
        Ok(planner)
    }

    /// Everything that must be equal for a state to fit.
    fn identity(&self) -> String {
        let super::CacheParams { shape, n_layers, n_cells, n_seq_max, n_threads: _, rope } = self.params;
        let rope = rope.map_or("none".into(), |rope| {
            let super::Rope { n_rot, freq_base, freq_scale, interleaved } = rope;
            format!("{n_rot}/{freq_base}/{freq_scale}/{interleaved}")
        });
        format!(
            "{}; {}; n_heads={}; layers={n_layers}; cells={n_cells}; sequences={n_seq_max}; slots={}; rope={rope}",
            self.recipe.spec(),
            self.layers[0].layout.format(),
            shape.n_heads,
            self.planner.n_slots(),
        )
    }

    /// Bytes of a state without its memory blocks.
    fn fixed_bytes(&self) -> usize {
        let header = MAGIC.len() + 4 + 8 + 4 + self.identity().len();
        header + (4 + 8) * self.cells.len() + 8 + self.planner.snapshot_bytes() + CHECKSUM_BYTES
    }

    pub(crate) fn memories(&self) -> impl Iterator<Item = &[u8]> {
        self.layers.iter().flat_map(|layer| [layer.k.bytes(), layer.v.bytes()])
    }
}

/// A state that fits and has been checked.
struct State<'a> {
    cells: Cells,
    planner: Planner,
    memories: Vec<SavedMemory<'a>>,
}

/// One side of one layer: which blocks follow, and the blocks.
struct SavedMemory<'a> {
    bits: &'a [u8],
    blocks: &'a [u8],
}

impl<'a> SavedMemory<'a> {
    fn parse(reader: &mut Reader<'a>, len: usize) -> Result<Self> {
        let n_blocks = len.div_ceil(BLOCK);
        let bits = reader.take(n_blocks.div_ceil(8))?;
        let is_set = |block: usize| bits[block / 8] >> (block % 8) & 1 == 1;
        if (n_blocks..8 * bits.len()).any(is_set) {
            return Err(malformed("the state has blocks behind the end of a layer"));
        }
        let held = (0..n_blocks).filter(|&block| is_set(block)).map(|block| BLOCK.min(len - block * BLOCK)).sum();
        Ok(Self { bits, blocks: reader.take(held)? })
    }

    fn restore(&self, memory: &mut [u8]) {
        let mut blocks = self.blocks;
        for (index, to) in memory.chunks_mut(BLOCK).enumerate() {
            if self.bits[index / 8] >> (index % 8) & 1 == 1 {
                let (block, rest) = blocks.split_at(to.len());
                to.copy_from_slice(block);
                blocks = rest;
            } else {
                to.fill(0);
            }
        }
    }
}

/// A bit for each block that is not zero, and those blocks.
fn write_memory(out: &mut Writer, memory: &[u8]) -> io::Result<()> {
    for eight in memory.chunks(8 * BLOCK) {
        let bits = eight.chunks(BLOCK).enumerate();
        out.write(&[bits.fold(0, |bits, (bit, block)| bits | u8::from(!is_zero(block)) << bit)])?;
    }
    memory.chunks(BLOCK).filter(|block| !is_zero(block)).try_for_each(|block| out.write(block))
}

/// Writes and sums up.
struct Writer<'a> {
    out: &'a mut dyn Write,
    checksum: u32,
}

impl Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.checksum = crc32c_append(self.checksum, bytes);
        self.out.write_all(bytes)
    }
}

/// Reads from the front of bytes that may end anywhere.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        if n > self.bytes.len() {
            return Err(malformed("the state is cut short"));
        }
        let (front, rest) = self.bytes.split_at(n);
        self.bytes = rest;
        Ok(front)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four")))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight")))
    }
}

fn check_checksum(bytes: &[u8]) -> Result<()> {
    let (body, sum) = bytes.split_at(bytes.len().saturating_sub(CHECKSUM_BYTES));
    if sum == crc32c(body).to_le_bytes() {
        return Ok(());
    }
    Err(malformed("the state is damaged: its checksum is wrong"))
}

fn malformed(text: impl Into<String>) -> Error {
    Error::new(Status::Format, text)
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|&byte| byte == 0)
}
