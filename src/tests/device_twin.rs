//! A layer in the CPU's memory and in a device's, for tests that compare bytes, and the rows and cells to feed it.

use half::f16;

use super::layer::{Layer, Ubatch, SCALE};
use super::random::Rng;
use crate::codec::page::Side;
use crate::cuda::attend::Workspace;
use crate::cuda::dequantize;
use crate::cuda::desc::{AttendCall, RotationDesc, StoreCall, StreamDesc, STORE_EARLY};
use crate::cuda::lab::{Buffer, Lab};
use crate::cuda::store::{enqueue, workspace_bytes};
use crate::cuda::Call;
use crate::error::Result;
use crate::plan::Plan;
use crate::rotation::Rotation;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

/// What memory holds before its first row.
pub(super) const POISON: u8 = 0xa5;

/// A layer twice: in the CPU's memory and in a device's.
pub(super) struct Twin<'a> {
    lab: &'a Lab,
    pub(super) layer: Layer,
    pub(super) memory: [Buffer; 2],
    pub(super) workspace: Buffer,
    profile: Buffer,
}

/// Which queries the store learns from.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Learns {
    Everything,
    /// No softmax denominators.
    Queries,
    Nothing,
}

impl<'a> Twin<'a> {
    pub(super) fn new(lab: &'a Lab, spec: &str, shape: Shape, n_cells: usize) -> Self {
        let mut layer = Layer::new(spec, shape, n_cells, IsaToken::new(Isa::Scalar).unwrap());
        layer.memory.iter_mut().for_each(|side| side.fill(POISON));
        let memory = layer.memory.each_ref().map(|side| lab.upload(side));
        let workspace = lab.upload(&vec![POISON; workspace_bytes(lab.device(), &layer.layout, n_cells as u32, 1)]);
        let profile = lab.upload(&layer.layout.profile());
        Self { lab, layer, memory, workspace, profile }
    }

    /// Lets positions move from now on.
    pub(super) fn rotate(&mut self, interleaved: bool) {
        let n_pairs = self.layer.layout.shape().head_dim_k as usize / 2 - 8;
        let frequencies: Vec<f64> = (0..n_pairs).map(|i| 1e4f64.powf(-(i as f64) / n_pairs as f64)).collect();
        let rotation = Rotation::new(&frequencies, interleaved).unwrap();
        self.layer.rotation = Some(rotation);
    }

    /// Moves every position by one of two distances, on the CPU.
    pub(super) fn shift(&mut self, rng: &mut Rng) {
        let mut distance = || rng.below(4096) as i32 - 2048;
        let (near, far) = (distance(), distance());
        let page = self.layer.layout.page();
        self.layer.shift(|cell| if cell % page < page / 2 { near } else { far });
        self.memory = self.layer.memory.each_ref().map(|side| self.lab.upload(side));
    }

    pub(super) fn call(&self, rows: &[Buffer; 6], ints: &[i32], learns: Learns) -> Call<StoreCall> {
        let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = self.layer.layout.shape();
        let [q, k, v, lse, plan, positions] = rows.each_ref().map(Buffer::pointer);
        let unless = |is_left_out: bool, pointer: *const f32| if is_left_out { std::ptr::null() } else { pointer };
        let call = StoreCall {
            k_cur: k.cast(),
            k_stride_token: u64::from(n_kv_heads * head_dim_k),
            k_stride_head: head_dim_k.into(),
            v_cur: v.cast(),
            v_stride_token: u64::from(n_kv_heads * head_dim_v),
            v_stride_head: head_dim_v.into(),
            q: unless(learns == Learns::Nothing, q.cast()),
            q_stride_token: u64::from(n_heads * head_dim_k),
            q_stride_head: head_dim_k.into(),
            lse: unless(learns != Learns::Everything, lse.cast()),
            k_mem: self.memory[0].pointer().cast(),
            v_mem: self.memory[1].pointer().cast(),
            plan: plan.cast(),
            positions: positions.cast(),
            rows: std::ptr::null_mut(),
            notes: std::ptr::null_mut(),
            note_stride: 0,
            n_pages: 0,
            row_stride: 0,
            // Nothing is under way when a test stores.
            phases: if ints.len().is_multiple_of(2) { STORE_EARLY } else { 0 },
            n_key_blocks: 1,
            n_value_blocks: 0,
            n_query_blocks: 0,
            scale: SCALE,
            n_tokens: Plan::new(ints).unwrap().n_tokens() as u32,
            streams: StreamDesc::default(),
        };
        Call { call, rotation: self.rotation(), n_streams: 1, plan_len: ints.len(), profile: self.profile() }
    }

    fn profile(&self) -> u64 {
        self.profile.pointer() as u64
    }

    fn rotation(&self) -> RotationDesc {
        self.layer.rotation.as_ref().map_or_else(RotationDesc::default, Rotation::describe)
    }

    /// Stores a ubatch in both and says where they differ.
    pub(super) fn store(&mut self, ints: &[i32], ubatch: &Ubatch, lse: &[f32], learns: Learns) -> Option<String> {
        let lab = self.lab;
        let floats = |x: &[f32]| lab.upload(x);
        let (plan, positions) = (lab.upload(ints), lab.upload(self.layer.positions()));
        let rows = [floats(&ubatch.q), floats(&ubatch.k), floats(&ubatch.v), floats(lse), plan, positions];
        let call = self.call(&rows, ints, learns);
        let workspace = Workspace { memory: self.workspace.pointer(), bytes: self.workspace.bytes() };
        // SAFETY: every pointer is a buffer of the device that holds what the header says and outlives the download, which
        // waits for the kernel.
        unsafe {
            enqueue(lab.device(), &self.layer.layout, call, workspace, std::ptr::null_mut()).unwrap();
        }
        let lse = (learns == Learns::Everything).then_some(lse);
        self.layer.store_learning(ints, ubatch, learns != Learns::Nothing, lse);
        let got = self.memory.each_ref().map(|side| lab.download::<u8>(side));
        [Side::Key, Side::Value].into_iter().find_map(|side| {
            let (want, got) = (&self.layer.memory[side as usize], &got[side as usize]);
            let at = want.iter().zip(got).position(|(a, b)| a != b)?;
            let n = want.iter().zip(got).filter(|(a, b)| a != b).count();
            let (want, got, n_bytes) = (want[at], got[at], want.len());
            Some(format!("{n} of {n_bytes} bytes, first {}: {got:#x} for {want:#x}", self.name_of(side, at)))
        })
    }

    /// All rows of keys and of values on the device, before the store of a ubatch or after it.
    pub(super) fn dequantize(&self, ints: &[i32], ubatch: Option<&Ubatch>) -> [Vec<f16>; 2] {
        self.try_dequantize(ints, ints.len(), ubatch, [true, true]).unwrap()
    }

    /// The same for the `wanted` sides, as if the plan had `plan_len` integers.
    pub(super) fn try_dequantize(
        &self,
        ints: &[i32],
        plan_len: usize,
        ubatch: Option<&Ubatch>,
        wanted: [bool; 2],
    ) -> Result<[Vec<f16>; 2]> {
        let Shape { n_kv_heads, head_dim_k, head_dim_v, .. } = self.layer.layout.shape();
        let n_kv = self.layer.layout.n_cells();
        let plan = self.lab.upload(ints);
        let rows = ubatch.map(|ubatch| [&ubatch.k, &ubatch.v].map(|rows| self.lab.upload(rows)));
        let pointer =
            |side: usize| rows.as_ref().map_or(std::ptr::null(), |rows| rows[side].pointer().cast_const().cast());
        let read = AttendCall {
            k_cur: pointer(0),
            k_stride_token: u64::from(n_kv_heads * head_dim_k),
            k_stride_head: head_dim_k.into(),
            v_cur: pointer(1),
            v_stride_token: u64::from(n_kv_heads * head_dim_v),
            v_stride_head: head_dim_v.into(),
            k_mem: self.memory[0].pointer().cast(),
            v_mem: self.memory[1].pointer().cast(),
            plan: plan.pointer().cast(),
            n_kv: n_kv as u32,
            n_tokens: Plan::new(ints).unwrap().n_tokens() as u32,
            // SAFETY: numbers and pointers, for which zero is a value.
            ..unsafe { std::mem::zeroed() }
        };
        let read = Call { call: read, rotation: self.rotation(), n_streams: 1, plan_len, profile: self.profile() };
        // What nobody writes must not look like a row.
        let out =
            [head_dim_k, head_dim_v].map(|dim| self.lab.upload(&vec![f16::NAN; n_kv * (n_kv_heads * dim) as usize]));
        let pointers = [0, 1].map(|side| if wanted[side] { out[side].pointer().cast() } else { std::ptr::null_mut() });
        // SAFETY: every pointer is NULL or a buffer of the device that holds what the header says and outlives the download, which
        // waits for the kernels.
        unsafe {
            dequantize::enqueue(self.lab.device(), &self.layer.layout, read, pointers, std::ptr::null_mut())?;
        }
        Ok(out.each_ref().map(|out| self.lab.download(out)))
    }

    /// What lies at a byte.
    fn name_of(&self, side: Side, at: usize) -> String {
        let (layout, desc) = (&self.layer.layout, self.layer.layout.describe());
        let desc = if side == Side::Key { desc.k } else { desc.v };
        let (head, at) = (at / layout.head_bytes(side), (at % layout.head_bytes(side)) as u64);
        let parts = [
            ("slots", 0),
            ("pool", desc.pool),
            ("pool's cells", desc.pool_table),
            ("learned", desc.learned),
            ("ring", desc.recent),
            ("headers", desc.headers),
            ("pages", desc.pages),
        ];
        let (part, start) = *parts.iter().rev().find(|(_, start)| *start <= at).unwrap();
        let inside = at - start;
        let page_bytes = u64::from(desc.page_bytes);
        match part {
            "pages" => format!("{side:?} head {head} page {} byte {}", inside / page_bytes, inside % page_bytes),
            _ => format!("{side:?} head {head} {part} byte {inside}"),
        }
    }
}

/// Rows as models make them, with channels far off zero, and if `wild` worse: tokens of small and of large norm, what is not
/// finite. Pages of tame rows go on with the factors of the page before.
pub(super) fn spoil(rng: &mut Rng, shape: &Shape, ubatch: &mut Ubatch, wild: bool) {
    let sides = [(shape.head_dim_k as usize, &mut ubatch.k), (shape.head_dim_v as usize, &mut ubatch.v)];
    for (dim, values) in sides {
        for row in values.chunks_exact_mut(dim) {
            row[5] = row[5] * 40.0 + 300.0;
            row[7] *= 8.0;
            if !wild {
                continue;
            }
            let size = match rng.below(16) {
                0 => 0.02,
                1 => 0.0,
                2 => 1e-6,
                3 => 100.0,
                _ => 1.0,
            };
            row.iter_mut().for_each(|x| *x *= size);
            if rng.below(32) == 0 {
                let bad = [f32::NAN, f32::INFINITY, -f32::INFINITY, 1e30];
                row[rng.below(dim)] = bad[rng.below(4)];
            }
        }
    }
    let n = ubatch.q.len();
    ubatch.q[rng.below(n)] = f32::NAN;
}

pub(super) fn denominators(rng: &mut Rng, n: usize) -> Vec<f32> {
    let one = |rng: &mut Rng| match rng.below(64) {
        0 => f32::NEG_INFINITY,
        1 => f32::NAN,
        _ => rng.normal() * 3.0 + 2.0,
    };
    (0..n).map(|_| one(rng)).collect()
}

/// The cells of the next ubatch, after some tokens were removed.
pub(super) fn next_cells(rng: &mut Rng, layer: &mut Layer, page: usize) -> Vec<usize> {
    let live = layer.live();
    let n_cells = live.len();
    let mut at = |n: usize| rng.below(n);
    match at(8) {
        0 => live[at(n_cells)..].fill(false),
        1 => (0..n_cells).for_each(|i| live[i] &= at(5) != 0),
        2 => {
            let first = at(n_cells);
            live[first..(first + page / 2).min(n_cells)].fill(false);
        }
        3 if at(4) == 0 => live.fill(false),
        _ => {}
    }
    let n = [1, 1, 2, 7, page / 2, page, page + 9, 2 * page + 1][at(8)];
    let mut free: Vec<usize> = (0..n_cells).filter(|cell| !live[*cell]).collect();
    if free.len() < n {
        live[..n].fill(false);
        free = (0..n_cells).filter(|cell| !live[*cell]).collect();
    }
    if at(4) == 0 {
        // Anywhere, in any order.
        (1..free.len()).for_each(|i| free.swap(i, at(i + 1)));
    }
    free.truncate(n);
    free
}
