//! How small integer codes lie in memory: the one packing that every codec uses and every kernel reads.
//!
//! A tile is a matrix of codes, `lanes` by `depth`. The depth is what a dot product sums over. For keys a lane is a token
//! and the depth runs over channels; for values a lane is a channel and the depth runs over tokens. So scores (`K q`) and
//! outputs (`p V`) are the same operation on the same bytes.
#![deny(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod many;
pub(crate) mod vector;

use std::fmt;

use crate::cuda::desc::{SideDesc, WIDTH_TERNARY};
use crate::error::{Error, Result, Status};

/// Lanes that are stored together: two vectors of sixteen 32-bit lanes, or one 128-byte row for a GPU warp.
pub const LANE_BLOCK: usize = 32;
/// Codes of consecutive depth in the four bytes of one 32-bit word: what one byte dot product consumes.
pub const QUAD: usize = 4;

/// Width of one code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Width {
    /// Ternary, five codes in a byte (1.6 bits).
    Ternary,
    /// 2 bits.
    Bits2,
    /// 3 bits, a plane of 2 bits and a plane of 1 bit.
    Bits3,
    /// 4 bits.
    Bits4,
    /// 8 bits.
    Bits8,
}

impl Width {
    /// Every width, narrowest first.
    pub const ALL: [Width; 5] = [Width::Ternary, Width::Bits2, Width::Bits3, Width::Bits4, Width::Bits8];

    /// Number of levels; codes run from 0 to `levels() - 1`.
    pub fn levels(self) -> u32 {
        match self {
            Width::Ternary => 3,
            Width::Bits2 => 4,
            Width::Bits3 => 8,
            Width::Bits4 => 16,
            Width::Bits8 => 256,
        }
    }

    /// The code value, possibly between two codes, that stands for the middle of the range.
    pub fn centre(self) -> f32 {
        (self.levels() - 1) as f32 * 0.5
    }

    /// Parses the number of bits as recipes spell it.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "1.6" => Ok(Width::Ternary),
            "2" => Ok(Width::Bits2),
            "3" => Ok(Width::Bits3),
            "4" => Ok(Width::Bits4),
            "8" => Ok(Width::Bits8),
            _ => Err(Error::new(Status::Recipe, format!("'{text}' is not a width: use 1.6, 2, 3, 4 or 8"))),
        }
    }
}

impl fmt::Display for Width {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Width::Ternary => "1.6",
            Width::Bits2 => "2",
            Width::Bits3 => "3",
            Width::Bits4 => "4",
            Width::Bits8 => "8",
        })
    }
}

/// Geometry of a tile.
///
/// # Layout
///
/// A *quad* is four codes of consecutive depth, one in each byte of a 32-bit little-endian word; the fields of each byte
/// belong to different quads:
///
/// | width | plane | quads per word | code of quad `q` in its byte |
/// |---|---|---|---|
/// | 2 | | 4 | bits `2 (q % 4)` and up |
/// | 3 | low | 4 | as for 2 |
/// | 3 | high | 8 | bit `q % 8`, worth 4 |
/// | 4 | | 2 | bits `4 (q % 2)` and up |
/// | 8 | | 1 | the byte |
/// | 1.6 | | 5 | base-3 digit `q % 5` (least significant first) |
///
/// Words are ordered `[lane block of 32][word along the depth][lane in the block]`; the high plane of width 3 follows the
/// low plane inside each lane block. So one 64-byte load is sixteen lanes at the same depth, unpacked by a shift and a
/// mask, and a byte dot product against four broadcast coefficients needs no sum across lanes.
///
/// Ternary quads come in fives. One or two left over (`depth / 4 % 5`) go to a *tail* behind all lane blocks: 2-bit fields
/// where entry `e = u * (lanes / 16) + lane / 16` of left-over quad `u` is field `e % 4` of vector `e / 4` (sixteen words).
/// Three or four left over fill one more word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    width: Width,
    lanes: usize,
    depth: usize,
    words: usize,
    tail_quads: usize,
}

/// Where one quad of one lane lies: first byte, and which field of each of its four bytes.
struct Place {
    byte: usize,
    field: usize,
}

impl Tile {
    /// A tile of `lanes` by `depth` codes; both must be multiples of 32.
    pub fn new(width: Width, lanes: usize, depth: usize) -> Self {
        assert!(lanes > 0 && lanes.is_multiple_of(LANE_BLOCK) && depth > 0 && depth.is_multiple_of(32));
        let quads = depth / QUAD;
        let (words, tail_quads) = match width {
            Width::Bits2 => (quads / 4, 0),
            Width::Bits3 => (quads / 4 + quads / 8, 0),
            Width::Bits4 => (quads / 2, 0),
            Width::Bits8 => (quads, 0),
            Width::Ternary if quads % 5 >= 3 => (quads / 5 + 1, 0),
            Width::Ternary => (quads / 5, quads % 5),
        };
        Self { width, lanes, depth, words, tail_quads }
    }

    /// Width of the codes.
    pub fn width(&self) -> Width {
        self.width
    }

    /// Number of lanes.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// Number of codes in a lane.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Bytes of one block of 32 lanes, the tail not included.
    pub fn block_bytes(&self) -> usize {
        self.words * LANE_BLOCK * 4
    }

    /// Offset of the tail, which is also the size of all lane blocks.
    pub fn tail_offset(&self) -> usize {
        self.lanes / LANE_BLOCK * self.block_bytes()
    }

    /// Number of left-over quads in the tail: 0, 1 or 2.
    pub fn tail_quads(&self) -> usize {
        self.tail_quads
    }

    /// Bytes of the whole tile, a multiple of 64.
    pub fn bytes(&self) -> usize {
        let tail_entries = self.tail_quads * self.lanes / 16;
        self.tail_offset() + tail_entries.div_ceil(4) * 64
    }

    fn word(&self, lane: usize, word: usize) -> usize {
        (lane / LANE_BLOCK * self.words + word) * LANE_BLOCK * 4 + lane % LANE_BLOCK * 4
    }

    /// The quad of the low (or only) plane, for the widths made of bit fields.
    fn place(&self, lane: usize, quad: usize, per_word: usize, first_word: usize) -> Place {
        Place { byte: self.word(lane, first_word + quad / per_word), field: quad % per_word }
    }

    fn tail_place(&self, lane: usize, tail_quad: usize) -> Place {
        let entry = tail_quad * (self.lanes / 16) + lane / 16;
        Place { byte: self.tail_offset() + entry / 4 * 64 + lane % 16 * 4, field: entry % 4 }
    }

    /// Reads one code.
    pub fn get(&self, bytes: &[u8], lane: usize, depth: usize) -> u8 {
        let (quad, j) = (depth / QUAD, depth % QUAD);
        let field = |p: Place, bits: usize| bytes[p.byte + j] >> (bits * p.field) & ((1u16 << bits) - 1) as u8;
        match self.width {
            Width::Bits2 => field(self.place(lane, quad, 4, 0), 2),
            Width::Bits4 => field(self.place(lane, quad, 2, 0), 4),
            Width::Bits8 => bytes[self.place(lane, quad, 1, 0).byte + j],
            Width::Bits3 => {
                let high = self.place(lane, quad, 8, self.depth / 16);
                field(self.place(lane, quad, 4, 0), 2) | field(high, 1) << 2
            }
            Width::Ternary if quad < self.words * 5 => {
                let place = self.place(lane, quad, 5, 0);
                bytes[place.byte + j] / POWERS_OF_3[place.field] % 3
            }
            Width::Ternary => field(self.tail_place(lane, quad - self.words * 5), 2),
        }
    }

    /// Writes one code, leaving all others as they are.
    pub fn set(&self, bytes: &mut [u8], lane: usize, depth: usize, code: u8) {
        let (quad, j) = (depth / QUAD, depth % QUAD);
        let mut field = |p: Place, bits: usize, code: u8| {
            let mask = (((1u16 << bits) - 1) as u8) << (bits * p.field);
            let byte = &mut bytes[p.byte + j];
            *byte = *byte & !mask | code << (bits * p.field);
        };
        match self.width {
            Width::Bits2 => field(self.place(lane, quad, 4, 0), 2, code),
            Width::Bits4 => field(self.place(lane, quad, 2, 0), 4, code),
            Width::Bits8 => bytes[self.place(lane, quad, 1, 0).byte + j] = code,
            Width::Bits3 => {
                field(self.place(lane, quad, 4, 0), 2, code & 3);
                field(self.place(lane, quad, 8, self.depth / 16), 1, code >> 2);
            }
            Width::Ternary if quad < self.words * 5 => {
                let place = self.place(lane, quad, 5, 0);
                let power = POWERS_OF_3[place.field];
                let byte = &mut bytes[place.byte + j];
                *byte = (*byte - *byte / power % 3 * power).wrapping_add(code * power);
            }
            Width::Ternary => field(self.tail_place(lane, quad - self.words * 5), 2, code),
        }
    }

    /// Writes all codes of one lane: `codes[depth]`. Equal to [`Tile::set`] for each, several times faster.
    pub fn set_lane(&self, bytes: &mut [u8], lane: usize, codes: &[u8]) {
        match self.width {
            Width::Ternary => codes.iter().enumerate().for_each(|(d, &c)| self.set(bytes, lane, d, c)),
            Width::Bits8 => self.pack_fields(bytes, lane, codes, 0, 8, |c| c),
            Width::Bits4 => self.pack_fields(bytes, lane, codes, 0, 4, |c| c),
            Width::Bits2 => self.pack_fields(bytes, lane, codes, 0, 2, |c| c),
            Width::Bits3 => {
                self.pack_fields(bytes, lane, codes, 0, 2, |c| c & 0x0303_0303);
                self.pack_fields(bytes, lane, codes, self.depth / 16, 1, |c| c >> 2 & 0x0101_0101);
            }
        }
    }

    /// Writes the code at `depth` of every lane: `codes[lanes]`. Equal to [`Tile::set`] for each, several times faster.
    pub fn set_depth(&self, bytes: &mut [u8], depth: usize, codes: &[u8]) {
        let quad = depth / QUAD;
        match self.width {
            Width::Ternary => codes.iter().enumerate().for_each(|(lane, &c)| self.set(bytes, lane, depth, c)),
            Width::Bits8 => self.put_fields(bytes, depth, codes, quad, 0, 8, |c| c),
            Width::Bits4 => self.put_fields(bytes, depth, codes, quad / 2, quad % 2, 4, |c| c),
            Width::Bits2 => self.put_fields(bytes, depth, codes, quad / 4, quad % 4, 2, |c| c),
            Width::Bits3 => {
                self.put_fields(bytes, depth, codes, quad / 4, quad % 4, 2, |c| c & 3);
                self.put_fields(bytes, depth, codes, self.depth / 16 + quad / 8, quad % 8, 1, |c| c >> 2);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn put_fields(
        &self,
        bytes: &mut [u8],
        depth: usize,
        codes: &[u8],
        word: usize,
        field: usize,
        bits: usize,
        part: fn(u8) -> u8,
    ) {
        let (shift, mask) = (bits * field, (((1u16 << bits) - 1) << (bits * field)) as u8);
        for (block, codes) in codes.chunks_exact(LANE_BLOCK).enumerate() {
            let at = self.word(block * LANE_BLOCK, word);
            let words = bytes[at..at + LANE_BLOCK * 4].chunks_exact_mut(4);
            words.zip(codes).for_each(|(w, &c)| w[depth % QUAD] = w[depth % QUAD] & !mask | part(c) << shift);
        }
    }

    fn pack_fields(&self, bytes: &mut [u8], lane: usize, codes: &[u8], word0: usize, bits: u32, part: fn(u32) -> u32) {
        let per_word = 8 / bits as usize;
        for (w, chunk) in codes.chunks_exact(per_word * QUAD).enumerate() {
            let word = chunk.chunks_exact(QUAD).enumerate().fold(0u32, |word, (field, quad)| {
                word | part(u32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]])) << (bits * field as u32)
            });
            let at = self.word(lane, word0 + w);
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
}

impl SideDesc {
    /// Fills in a tile of one width.
    pub(crate) fn describe_tile(&mut self, tile: &Tile) {
        self.width = match tile.width() {
            Width::Ternary => WIDTH_TERNARY,
            Width::Bits2 => 2,
            Width::Bits3 => 3,
            Width::Bits4 => 4,
            Width::Bits8 => 8,
        };
        self.tile_bytes = tile.bytes() as u32;
        self.tile_words = (tile.block_bytes() / (LANE_BLOCK * 4)) as u32;
        (self.tile_tail, self.tile_tail_quads) = (tile.tail_offset() as u32, tile.tail_quads() as u32);
    }
}

const POWERS_OF_3: [u8; 5] = [1, 3, 9, 27, 81];

#[cfg(test)]
mod tests {
    use super::*;

    fn code(seed: usize, levels: u32) -> u8 {
        ((seed.wrapping_mul(2_654_435_761) >> 7) % levels as usize) as u8
    }

    #[test]
    fn every_code_reads_back_and_disturbs_no_other() {
        for width in Width::ALL {
            for (lanes, depth) in [(32, 32), (32, 64), (128, 64), (96, 96), (128, 128), (64, 160), (32, 256)] {
                let tile = Tile::new(width, lanes, depth);
                let mut bytes = vec![0u8; tile.bytes()];
                for pass in 0..2 {
                    for i in 0..lanes * depth {
                        tile.set(&mut bytes, i / depth, i % depth, code(i + pass, width.levels()));
                    }
                    for i in 0..lanes * depth {
                        assert_eq!(
                            tile.get(&bytes, i / depth, i % depth),
                            code(i + pass, width.levels()),
                            "{tile:?} {i}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn whole_lanes_and_whole_depths_equal_single_codes() {
        for width in Width::ALL {
            let tile = Tile::new(width, 64, 96);
            let at = |lane: usize, d: usize| code(lane * 96 + d, width.levels());
            let mut bytes = [vec![0u8; tile.bytes()], vec![0u8; tile.bytes()], vec![0xa5u8; tile.bytes()]];
            // Ternary bytes must be valid before one of their digits is replaced.
            bytes[2].fill(if width == Width::Ternary { 242 } else { 0xa5 });
            for lane in 0..64 {
                let codes: Vec<u8> = (0..96).map(|d| at(lane, d)).collect();
                codes.iter().enumerate().for_each(|(d, &c)| tile.set(&mut bytes[0], lane, d, c));
                tile.set_lane(&mut bytes[1], lane, &codes);
            }
            for d in 0..96 {
                let codes: Vec<u8> = (0..64).map(|lane| at(lane, d)).collect();
                tile.set_depth(&mut bytes[2], d, &codes);
            }
            assert_eq!(bytes[0], bytes[1], "{width}");
            for i in 0..64 * 96 {
                assert_eq!(tile.get(&bytes[2], i / 96, i % 96), at(i / 96, i % 96), "{width} {i}");
            }
        }
    }

    #[test]
    fn bits_per_code() {
        let bits = |w, lanes, depth| Tile::new(w, lanes, depth).bytes() as f64 * 8.0 / (lanes * depth) as f64;
        for (width, want) in [(Width::Bits2, 2.0), (Width::Bits3, 3.0), (Width::Bits4, 4.0), (Width::Bits8, 8.0)] {
            assert_eq!(bits(width, 128, 64), want);
        }
        // 6 words of five quads and 2 tail quads for a depth of 128: 26 bytes a lane instead of the ideal 25.6.
        assert_eq!(bits(Width::Ternary, 128, 128), 1.625);
        assert_eq!(bits(Width::Ternary, 128, 160), 1.6);
    }
}
