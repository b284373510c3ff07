//! What a kernel knows of a layer and of a call: plain structs that Rust fills in and device code reads. build.rs renders
//! this file into `kvq_desc.h`, so no offset is written twice.
#![forbid(unsafe_code)]

/// Bytes of a [`LayerDesc`], asserted on both sides.
pub const LAYER_DESC_BYTES: usize = 456;

/// Threads of a block of the store step.
pub const STORE_THREADS: u32 = 512;
/// Shared memory of such a block, without its rows.
pub const STORE_SCRATCH_BYTES: u32 = 20 << 10;

/// Of [`StoreCall::phases`]: what is known of queries and tokens is brought up to date, and the outlier pool is filled where
/// several blocks seal pages.
pub const STORE_LEARN: u32 = 1;
/// Of [`StoreCall::phases`]: pages are sealed.
pub const STORE_SEAL: u32 = 2;
/// Of [`StoreCall::phases`]: errors of pages are added up, rows go to slots.
pub const STORE_FINISH: u32 = 4;
/// Of [`StoreCall::phases`]: there are [`FEW_ROWS`] query rows of a KV head at most, and all phases.
pub const STORE_FEW: u32 = 8;
/// Of [`StoreCall::phases`]: what the step reads was there before the attention that is before it in the stream.
pub const STORE_EARLY: u32 = 16;
/// Query rows of a KV head whose store step, if it seals no page, reads everything before it writes anything.
pub const FEW_ROWS: u32 = 8;
/// Query rows that a block of 32 channels has in shared memory where a step has many.
pub const QUERIES_AT_ONCE: u32 = 256;

/// Flag of a record's source in a plan: [`crate::plan::Seal::Fresh`].
pub const RECORD_FRESH: i32 = 1 << 30;
/// Flag of a record's source in a plan: [`crate::plan::Seal::Renew`].
pub const RECORD_RENEW: i32 = 1 << 29;

/// An offset of a part that the page does not have.
pub const ABSENT: u32 = u32::MAX;

/// Of [`SideDesc::codec`]: groups of channels of a token share a step; see `codec::group`.
pub const CODEC_GROUP: u32 = 0;
/// Of [`SideDesc::codec`]: channels have steps, and widths of their own; see `codec::channel`.
pub const CODEC_CHANNEL: u32 = 1;
/// Of [`SideDesc::codec`]: tokens have widths of their own; see `codec::adaptive`.
pub const CODEC_ADAPTIVE: u32 = 2;
/// Of [`SideDesc::codec`]: keys as `CODEC_CHANNEL` has them, in a frame that [`FrameDesc`] knows; see `codec::aqua`.
pub const CODEC_AQUA: u32 = 3;

/// Of [`SideDesc::width`]: ternary codes, five in a byte. Other widths are their bits.
pub const WIDTH_TERNARY: u32 = 1;

/// Of [`SideDesc::clip`]: the best step for a Gaussian, or a factor by width.
pub const CLIP_AUTO: u32 = 0;
/// Of [`SideDesc::clip`]: [`SideDesc::clip_factor`].
pub const CLIP_FACTOR: u32 = 1;
/// Of [`SideDesc::clip`]: the range is cut into as many cells as there are codes.
pub const CLIP_CELLS: u32 = 2;

/// Keys or values of a layer. Offsets are bytes: the first ones into a head region, those of a page into its bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SideDesc {
    /// Bytes of a head region.
    pub head_bytes: u64,
    /// The outlier pool's rows.
    pub pool: u64,
    /// The outlier pool's cells.
    pub pool_table: u64,
    /// What the store step has learned.
    pub learned: u64,
    /// End of what was learned.
    pub learned_end: u64,
    /// The ring of recent queries.
    pub recent: u64,
    /// End of the ring.
    pub recent_end: u64,
    /// Page headers, 4 bytes each.
    pub headers: u64,
    /// Pages.
    pub pages: u64,
    /// Bytes of a page, a multiple of 64.
    pub page_bytes: u32,
    /// Values of a head vector.
    pub head_dim: u32,
    /// `CODEC_...`
    pub codec: u32,
    /// Codes of one width (`CODEC_GROUP`): bits, or `WIDTH_TERNARY`.
    pub width: u32,
    /// Channels that share a step (`CODEC_GROUP`), else `head_dim`.
    pub group: u32,
    /// Groups of a head vector.
    pub n_groups: u32,
    /// Bytes of the tile of a group (`CODEC_GROUP`) or of all codes of the page.
    pub tile_bytes: u32,
    /// Words of a lane, ternary tails not included. `CODEC_ADAPTIVE`, keys: it depends on the page, 0 here.
    pub tile_words: u32,
    /// Ternary: left-over quads of a lane in the tail, and where the tail is inside the tile.
    pub tile_tail_quads: u32,
    /// See `tile_tail_quads`.
    pub tile_tail: u32,
    /// Mixed widths: sum of the widths of the segments.
    pub budget: u32,
    /// Mixed widths: places of a segment and number of segments.
    pub segment: u32,
    /// See `segment`. `CODEC_AQUA`: it depends on the page, which has so many at most.
    pub n_segments: u32,
    /// `CODEC_AQUA`: the fewest that a page has. Offsets behind the steps depend on their number.
    pub fewest_segments: u32,
    /// `CODEC_AQUA`: where the page says what its frame is.
    pub tail: u32,
    /// Steps.
    pub steps: u32,
    /// Mid-points, or `ABSENT`.
    pub mids: u32,
    /// FP16 channel means, or `ABSENT`.
    pub mean: u32,
    /// Exponents of the smoothing factors, or `ABSENT`.
    pub exponents: u32,
    /// Order of the places, or `ABSENT`: they are in natural order.
    pub order: u32,
    /// `CODEC_ADAPTIVE`: values kept exactly, or `ABSENT`.
    pub outliers: u32,
    /// `CODEC_ADAPTIVE`: so many of them in a row.
    pub n_outliers: u32,
    /// Head vectors are rotated before they are coded.
    pub rotate: u32,
    /// One 8-bit scale for a step and no mid-point.
    pub symmetric: u32,
    /// Steps and mid-points are FP16.
    pub half: u32,
    /// Codes stand for the levels that are best for a Gaussian.
    pub normal: u32,
    /// The step is fitted again after coding.
    pub refit: u32,
    /// `CODEC_ADAPTIVE`: narrowest code in bits.
    pub min_bits: u32,
    /// `CODEC_ADAPTIVE`: widths follow the attention that tokens had.
    pub attention: u32,
    /// `CLIP_...`
    pub clip: u32,
    /// With `CLIP_FACTOR`: the part of the half-range that codes reach.
    pub clip_factor: f32,
    /// `CODEC_ADAPTIVE`, keys: the step that a token without attention may have.
    pub bound: f32,
}

/// A layer, as [`crate::layout::Layout`] has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerDesc {
    /// Query heads.
    pub n_heads: u32,
    /// Heads of keys and values.
    pub n_kv_heads: u32,
    /// Query heads of a KV head.
    pub gqa_ratio: u32,
    /// Cells of a stream.
    pub n_cells: u32,
    /// Exact slots of a stream.
    pub n_slots: u32,
    /// Cells of a page.
    pub page: u32,
    /// Pages of a stream.
    pub n_pages: u32,
    /// Rows of a head's outlier pool.
    pub pool_rows: u32,
    /// Tokens that compete for a place in the pool.
    pub pool_outliers: u32,
    /// Query tokens that the ring of recent queries has room for.
    pub attn_window: u32,
    /// 1: values are predicted from keys, and their pages hold the rest.
    pub predicts: u32,
    /// Keys.
    pub k: SideDesc,
    /// Values.
    pub v: SideDesc,
    /// `CODEC_AQUA`: address of the layer's [`FrameDesc`].
    pub profile: u64,
}

/// What kernels know of the frames of a layer's pages: the beginning of the bytes that kvq_layout_profile gives. Offsets count
/// floats from there; arrays hold all KV heads, one after the other.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FrameDesc {
    /// How keys turn with their positions.
    pub rotation: RotationDesc,
    /// `[page][dim_k]`: what has been taken off the keys of each row, or `ABSENT`.
    pub bias: u32,
    /// `[dim_k]`: the same in the middle of a page.
    pub middle: u32,
    /// `[dim_k][coefficient]`: from the frame to what is coded.
    pub transform: u32,
    /// `[coefficient][dim_k]`: back.
    pub directions: u32,
    /// `[dim_k][coefficient]`: from queries in the frame to what meets coefficients.
    pub queries: u32,
    /// `[dim_k + 1][dim_v]`: from coefficients to values, and what is added, or `ABSENT`.
    pub predictor: u32,
    /// `[pair]`, integers: which curves behind the powers have its cosine and its sine, or `ABSENT`: it is slow.
    pub curve_of: u32,
    /// Floats from power to power of `slow`.
    pub slow_stride: u32,
    /// Of mirrored and of negated curves (`codec::aqua::curves`): powers, `[power][slow_stride]` by pair.
    pub slow: [u32; 2],
    /// Numbers of powers.
    pub n_slow: [u32; 2],
    /// `[curve][page / 2]`, powers first.
    pub curves: [u32; 2],
    /// Numbers of curves.
    pub n_curves: [u32; 2],
}

/// Bytes of a [`FrameDesc`], asserted on both sides.
pub const FRAME_DESC_BYTES: usize = 2120;

/// Where each array of a plan lies, in ints; see `plan`. Pairs are the views before and after the store.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PlanDesc {
    /// The cell of each slot.
    pub slot_cells: [u32; 2],
    /// The cell of each row of the ubatch.
    pub row_cells: u32,
    /// The slot of each row of the ubatch.
    pub row_slots: u32,
    /// Bits of the cells that are read from their pages.
    pub page_bits: [u32; 2],
    /// Records.
    pub records: u32,
    /// The number of records.
    pub n_records: u32,
    /// The numbers of pages to scan.
    pub n_pages: [u32; 2],
    /// Turns.
    pub turns: u32,
    /// The number of turns.
    pub n_turns: u32,
    /// Whether the stream starts anew.
    pub starts_anew: u32,
    /// Ints of a turn: page, distance, a bit for each cell.
    pub turn_ints: u32,
}

/// How keys turn with their positions; see `rotation`. Without pairs, no position has moved.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RotationDesc {
    /// Cosine and sine of a move by one position.
    pub pairs: [[f64; 2]; 128],
    /// Pairs that turn.
    pub n_pairs: u32,
    /// 1: pairs are neighbours, 0: halves.
    pub interleaved: u32,
}

/// What differs from stream to stream in what the kernels of a call read: distances from one to the next. Rows, queries,
/// outputs and softmax denominators of the streams follow each other.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StreamDesc {
    /// Bytes of key memory.
    pub k: u64,
    /// Bytes of value memory.
    pub v: u64,
    /// Ints of plans.
    pub plan: u64,
    /// Elements of masks.
    pub mask: u64,
    /// Store: ints of positions.
    pub positions: u64,
    /// Attention: floats of what blocks leave each other in the workspace.
    pub partial: u64,
}

/// Threads of a block and what they share, for the attention kernels that let it vary.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct BlockDesc {
    /// Warps.
    pub n_warps: u32,
    /// Of these, warps that take exact rows before they take pages.
    pub exact_warps: u32,
    /// Shared memory: bytes of it.
    pub shared_bytes: u32,
    /// Bytes before what the warps leave of exact rows.
    pub shared_exact: u32,
    /// Bytes before that of the first warp.
    pub shared_warps: u32,
    /// Shared memory of a warp.
    pub shared_warp: u32,
    /// Of that, bytes of a query row's coefficients for keys.
    pub coefficient_bytes: u32,
    /// And for values.
    pub weight_bytes: u32,
}

/// What the attention kernels get of a call besides the layer. Pointers are the device's, those of the first stream; device
/// code makes those of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttendCall {
    /// As in kvq_attend_args, also all that follow.
    pub q: *const f32,
    /// Elements.
    pub q_stride_token: u64,
    /// Elements.
    pub q_stride_head: u64,
    /// NULL: attend the view after the store.
    pub k_cur: *const f32,
    /// Elements.
    pub k_stride_token: u64,
    /// Elements.
    pub k_stride_head: u64,
    /// Values of the ubatch.
    pub v_cur: *const f32,
    /// Elements.
    pub v_stride_token: u64,
    /// Elements.
    pub v_stride_head: u64,
    /// Key memory of the stream.
    pub k_mem: *const u8,
    /// Value memory of the stream.
    pub v_mem: *const u8,
    /// The plan.
    pub plan: *const i32,
    /// FP16 or float, or NULL.
    pub mask: *const u8,
    /// Elements.
    pub mask_stride_token: u64,
    /// `[n_heads]` or NULL.
    pub sink_logits: *const f32,
    /// `[n_tokens][n_heads][head_dim_v]`
    pub out: *mut f32,
    /// `[n_tokens][n_heads]` or NULL.
    pub lse: *mut f32,
    /// `[stream][tile of rows][head]`: blocks that are done; zero between calls.
    pub tickets: *mut u32,
    /// `[stream][tile of rows][head][split]`: outputs `[row][head_dim_v]`, then maximum and sum `[row][2]`.
    pub partial: *mut f32,
    /// 1: the mask is FP16.
    pub mask_is_f16: u32,
    /// Columns of the mask.
    pub n_kv: u32,
    /// Factor on the scores.
    pub scale: f32,
    /// Soft cap, 0: none.
    pub softcap: f32,
    /// ALiBi, 0: none.
    pub max_bias: f32,
    /// Query tokens.
    pub n_tokens: u32,
    /// Blocks of threads that share the cells of a tile of rows.
    pub n_splits: u32,
    /// 0: the view before the store, 1: after.
    pub view: u32,
    /// Threads of a block.
    pub block: BlockDesc,
    /// From stream to stream.
    pub streams: StreamDesc,
}

/// What the attention kernels get.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttendParams {
    /// The call.
    pub call: AttendCall,
    /// The layer.
    pub layer: LayerDesc,
    /// The plan's arrays.
    pub plan_at: PlanDesc,
    /// How keys turn with their positions.
    pub rotation: RotationDesc,
}

impl Default for RotationDesc {
    fn default() -> Self {
        Self { pairs: [[1.0, 0.0]; 128], n_pairs: 0, interleaved: 0 }
    }
}

/// Threads of a block that decodes rows.
pub const DEQUANTIZE_THREADS: u32 = 256;
/// Warps of a block of `dequantize_rows.cuh`.
pub const DEQUANTIZE_ROWS_WARPS: u32 = 2;

/// What the kernel gets that writes rows as FP16, by cell.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DequantizeParams {
    /// What attention would read; its queries, mask, outputs and workspace do not matter.
    pub read: AttendParams,
    /// `[stream][n_kv_heads][n_kv][head_dim]`, FP16.
    pub rows: *mut u16,
    /// 0: keys, 1: values.
    pub side: u32,
    /// 0: rows of pages, and zeros where a page has none; 1: exact rows.
    pub exact: u32,
    /// Shared memory of a warp of `dequantize_rows.cuh`.
    pub shared_warp: u32,
}

/// What the store kernel gets of a call besides the layer, as [`AttendCall`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StoreCall {
    /// As in kvq_store_args, also all that follow.
    pub k_cur: *const f32,
    /// Elements.
    pub k_stride_token: u64,
    /// Elements.
    pub k_stride_head: u64,
    /// Values of the ubatch.
    pub v_cur: *const f32,
    /// Elements.
    pub v_stride_token: u64,
    /// Elements.
    pub v_stride_head: u64,
    /// Queries of the ubatch, or NULL.
    pub q: *const f32,
    /// Elements.
    pub q_stride_token: u64,
    /// Elements.
    pub q_stride_head: u64,
    /// `[n_tokens][n_heads]` or NULL.
    pub lse: *const f32,
    /// Key memory of the stream.
    pub k_mem: *mut u8,
    /// Value memory of the stream.
    pub v_mem: *mut u8,
    /// The plan.
    pub plan: *const i32,
    /// By cell, or NULL for layers without a profile.
    pub positions: *const i32,
    /// `[side][head][page][row_stride]`: rows on their way. NULL: they are in shared memory.
    pub rows: *mut f32,
    /// `[head][note_stride]`: the number of pages, then noise, signal and rows of the sample of each of `n_pages`, then the
    /// row of the outlier pool that each record enters, 16 bits. NULL: one block seals all pages of a head and needs no notes.
    pub notes: *mut f32,
    /// Floats from head to head in `notes`.
    pub note_stride: u32,
    /// Most pages of a call.
    pub n_pages: u32,
    /// Floats from row to row.
    pub row_stride: u32,
    /// Which of `STORE_...` this launch is for; before it is cut into launches `STORE_EARLY` or 0.
    pub phases: u32,
    /// Blocks that share the pages of a head's keys.
    pub n_key_blocks: u32,
    /// The same for values; 0: the blocks of the keys have them too.
    pub n_value_blocks: u32,
    /// Blocks that learn from a head's queries, 32 channels each, in the launch that learns; 0: that of the keys does it.
    pub n_query_blocks: u32,
    /// Factor on the scores.
    pub scale: f32,
    /// Rows of the ubatch.
    pub n_tokens: u32,
    /// From stream to stream.
    pub streams: StreamDesc,
}

/// What the store kernel gets.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StoreParams {
    /// The call.
    pub call: StoreCall,
    /// The layer.
    pub layer: LayerDesc,
    /// The plan's arrays.
    pub plan_at: PlanDesc,
    /// How keys turn with their positions.
    pub rotation: RotationDesc,
}

const _: () = assert!(std::mem::size_of::<LayerDesc>() == LAYER_DESC_BYTES);
const _: () = assert!(std::mem::size_of::<FrameDesc>() == FRAME_DESC_BYTES);
