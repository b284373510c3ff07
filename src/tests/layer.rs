//! One layer of one stream in memory of its own, for tests that need plans, attention and the store step together.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::profile;
use super::random::Rng;
use crate::attention::{attend, combine, AttendArgs, Mask};
use crate::codec::page::Side;
use crate::layout::Layout;
use crate::location::Location;
use crate::plan::{plan_len, Plan};
use crate::planner::{Planner, Row};
use crate::recent::Attended;
use crate::recipe::presets::PRESETS;
use crate::recipe::{Recipe, METHODS};
use crate::rotation::Rotation;
use crate::rows::Rows;
use crate::shape::Shape;
use crate::shift::shift_head;
use crate::simd::isa::IsaToken;
use crate::store::{dequantize_head, dequantize_values, store_head, StoreRows};

/// Every preset, every method with its defaults and its published setting, and `more`.
pub(super) fn recipes(more: &[&str]) -> Vec<String> {
    let presets = PRESETS.iter().map(|preset| preset.name.to_string());
    let methods = METHODS.iter().map(|method| method.name.to_string());
    let papers = METHODS.iter().filter(|method| method.paper.is_some()).map(|method| format!("{}:paper", method.name));
    presets.chain(methods).chain(papers).chain(more.iter().map(|spec| spec.to_string())).collect()
}

/// Queries, keys and values of an ubatch.
#[derive(Clone)]
pub(super) struct Ubatch {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

pub(super) struct Layer {
    pub(super) layout: Layout,
    pub(super) planner: Planner,
    /// Keys and values.
    pub(super) memory: [Vec<u8>; 2],
    live: Vec<bool>,
    /// Of each cell's token.
    positions: Vec<i32>,
    /// How keys turn when positions move.
    pub(super) rotation: Option<Rotation>,
}

impl Layer {
    pub(super) fn new(spec: &str, shape: Shape, n_cells: usize, token: IsaToken) -> Self {
        let recipe = profile::parse(spec, shape);
        let planner = Planner::new(recipe.planner_config(n_cells, 1, 1)).unwrap();
        // Not one of the first layers, which may go without an outlier pool.
        let layout = Layout::with_isa(&recipe, shape, 3, n_cells, planner.n_slots(), token).unwrap();
        let memory = [vec![0; layout.k_bytes()], vec![0; layout.v_bytes()]];
        Self { layout, planner, memory, live: vec![false; n_cells], positions: vec![0; n_cells], rotation: None }
    }

    /// Whether the recipe allows this shape.
    pub(super) fn fits(spec: &str, shape: Shape) -> bool {
        Layout::new(&profile::parse(spec, shape), shape, 3, 64, 64).is_ok()
    }

    /// Cells of a page of a recipe.
    pub(super) fn page_of(spec: &str) -> usize {
        Recipe::parse(spec).unwrap().page
    }

    /// Plans an ubatch for these cells, at positions of the same numbers.
    pub(super) fn plan(&mut self, cells: Range<usize>) -> Vec<i32> {
        let n_cells = self.live.len();
        let first = cells.start;
        self.plan_cells(&cells.map(|cell| cell % n_cells).collect::<Vec<usize>>(), first)
    }

    /// Plans an ubatch for these cells, at positions from `first` on.
    pub(super) fn plan_cells(&mut self, cells: &[usize], first: usize) -> Vec<i32> {
        let n_cells = self.live.len();
        let row = |(i, &cell): (usize, &usize)| Row { cell: cell as u32, pos: (first + i) as i32, seq: 0 };
        let rows: Vec<Row> = cells.iter().enumerate().map(row).collect();
        let mut ints = vec![0; plan_len(rows.len(), self.planner.n_slots(), n_cells, self.layout.page())];
        let live = &self.live;
        self.planner.plan(0, &rows, &|cell| live[cell], &mut ints).unwrap();
        for row in &rows {
            self.live[row.cell as usize] = true;
            self.positions[row.cell as usize] = row.pos;
        }
        ints
    }

    /// The position of each cell's token.
    pub(super) fn positions(&self) -> &[i32] {
        &self.positions
    }

    /// Whether each cell holds a token; some may be removed.
    pub(super) fn live(&mut self) -> &mut [bool] {
        &mut self.live
    }

    /// Moves the positions of live cells, each by its own distance.
    ///
    /// # Panics
    /// Without a rotation.
    pub(super) fn shift(&mut self, distance: impl Fn(usize) -> i32) {
        let live = &self.live;
        let moved: Vec<i32> = (0..live.len()).map(|cell| if live[cell] { distance(cell) } else { 0 }).collect();
        let shift = self.planner.shift(0, &moved, &|cell| live[cell]).unwrap();
        self.positions.iter_mut().zip(&moved).for_each(|(pos, moved)| *pos += moved);
        let [keys, values] = &mut self.memory;
        let keys = keys.chunks_exact_mut(self.layout.head_bytes(Side::Key));
        let values = values.chunks_exact_mut(self.layout.head_bytes(Side::Value));
        for (region, values) in keys.zip(values) {
            shift_head(&self.layout, region, Some(values), &shift, self.rotation.as_ref().unwrap()).unwrap();
        }
    }

    /// Random rows of `n` tokens.
    pub(super) fn ubatch(&self, rng: &mut Rng, n: usize) -> Ubatch {
        let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = self.layout.shape();
        let mut values = |heads: u32, dim: u32| rng.values(n * (heads * dim) as usize);
        Ubatch { q: values(n_heads, head_dim_k), k: values(n_kv_heads, head_dim_k), v: values(n_kv_heads, head_dim_v) }
    }

    /// Attends, every held cell being visible: output rows and the logarithms of their denominators.
    pub(super) fn attend(
        &self,
        ints: &[i32],
        ubatch: &Ubatch,
        n_splits: usize,
        sink_logits: Option<&[f32]>,
    ) -> (Vec<f32>, Vec<f32>) {
        let shape = self.layout.shape();
        let (n_heads, dim_v) = (shape.n_heads as usize, shape.head_dim_v as usize);
        let plan = Plan::new(ints).unwrap();
        let n_tokens = plan.n_tokens();
        let [q, k, v] = self.rows(ubatch);
        let args = AttendArgs {
            rotation: None,
            q,
            current: Some((k, v)),
            k_mem: &self.memory[0],
            v_mem: &self.memory[1],
            plan,
            mask: Mask::None,
            mask_stride_token: 0,
            n_kv: self.live.len(),
            sink_logits,
            scale: SCALE,
            softcap: 0.0,
            max_bias: 0.0,
            n_tokens,
            n_splits,
            with_lse: n_splits == 1,
        };
        let n_rows = n_tokens * n_heads;
        let mut out = vec![0f32; if n_splits == 1 { n_rows * (dim_v + 1) } else { n_splits * n_rows * (dim_v + 2) }];
        let mut put = |at: usize, row: &[f32]| out[at..at + row.len()].copy_from_slice(row);
        attend(&self.layout, &args, 0, 1, &mut put).unwrap();
        if n_splits > 1 {
            let partial = std::mem::replace(&mut out, vec![0f32; n_rows * (dim_v + 1)]);
            let mut put = |at: usize, row: &[f32]| out[at..at + row.len()].copy_from_slice(row);
            combine(&self.layout, &partial, sink_logits, n_splits, n_tokens, true, 0, 1, &mut put).unwrap();
        }
        let lse = out.split_off(n_rows * dim_v);
        (out, lse)
    }

    /// The store step of all heads.
    pub(super) fn store(&mut self, ints: &[i32], ubatch: &Ubatch, lse: &[f32]) {
        self.store_learning(ints, ubatch, true, Some(lse));
    }

    /// The store step of all heads, which learns from queries or not.
    pub(super) fn store_learning(&mut self, ints: &[i32], ubatch: &Ubatch, with_q: bool, lse: Option<&[f32]>) {
        let shape = self.layout.shape();
        let [q, k, v] = rows_of(&shape, ubatch);
        let attended = lse.map(|lse| Attended { lse, scale: SCALE });
        let rows = StoreRows {
            positions: Some(&self.positions),
            k,
            v,
            q: with_q.then_some(q),
            attended,
            rotation: self.rotation.as_ref(),
        };
        let plan = Plan::new(ints).unwrap();
        let [keys, values] = &mut self.memory;
        let keys = keys.chunks_exact_mut(self.layout.head_bytes(Side::Key));
        let values = values.chunks_exact_mut(self.layout.head_bytes(Side::Value));
        for (head, (key, value)) in keys.zip(values).enumerate() {
            store_head(&self.layout, head, [key, value], &rows, &plan).unwrap();
        }
    }

    /// The decoded rows of one side of the first head.
    pub(super) fn decoded(&self, side: Side, location: &[Location], cells: Range<usize>) -> Vec<f32> {
        let layout = &self.layout;
        let [keys, values] = [Side::Key, Side::Value].map(|of| &self.memory[of as usize][..layout.head_bytes(of)]);
        let mut out = vec![0f32; cells.len() * layout.side(side).head_dim];
        let rotation = self.rotation.as_ref();
        match side {
            Side::Key => dequantize_head(layout, side, keys, location, rotation, cells, &mut out).unwrap(),
            Side::Value => dequantize_values(layout, [keys, values], location, cells, &mut out).unwrap(),
        }
        out
    }

    pub(super) fn rows<'a>(&self, ubatch: &'a Ubatch) -> [Rows<'a>; 3] {
        rows_of(&self.layout.shape(), ubatch)
    }
}

/// Factor on scores.
pub(super) const SCALE: f32 = 0.1;

fn rows_of<'a>(shape: &Shape, ubatch: &'a Ubatch) -> [Rows<'a>; 3] {
    [
        (&ubatch.q, shape.n_heads, shape.head_dim_k),
        (&ubatch.k, shape.n_kv_heads, shape.head_dim_k),
        (&ubatch.v, shape.n_kv_heads, shape.head_dim_v),
    ]
    .map(|(data, heads, dim)| Rows { data, stride_token: (heads * dim) as usize, stride_head: dim as usize })
}
