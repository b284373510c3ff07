//! A whole cache for programs without llama.cpp: places tokens into cells, keeps K and V of all layers packed, attends.
//!
//! One step of a model is [`Cache::begin`], then [`Cache::attend`] once for each layer in any order, then
//! [`Cache::end`]. All sequences share one stream.
#![forbid(unsafe_code)]

mod cells;
mod file;
mod mask;
mod memory;
mod rope;
mod state;
#[cfg(test)]
mod tests;

pub use cells::MAX_SEQUENCES;
pub use rope::Rope;

use std::sync::{Mutex, PoisonError};

use crate::attention;
use crate::attention::AttendArgs;
use crate::codec::page::Side;
use crate::error::{Error, Result, Status};
use crate::layout::Layout;
use crate::parallel;
use crate::plan::{plan_len, Plan};
use crate::planner::{Planner, Row};
use crate::recent::Attended;
use crate::recipe::Recipe;
use crate::rotation::Rotation;
use crate::rows::Rows;
use crate::shape::Shape;
use crate::store::{self, StoreRows};

use cells::Cells;
use mask::{MaskData, MaskKind};
use memory::Memory;

/// The stream of the planner that everything here is in.
const STREAM: usize = 0;
/// More layers than any model has; keeps sizes away from overflow.
const MAX_LAYERS: usize = 1 << 16;

/// What a [`Cache`] is made for.
#[derive(Clone, Copy, Debug)]
pub struct CacheParams {
    /// Shape of every layer.
    pub shape: Shape,
    /// Layers with K and V of their own.
    pub n_layers: usize,
    /// Tokens that fit.
    pub n_cells: usize,
    /// Sequences, numbered from 0: at most [`MAX_SEQUENCES`].
    pub n_seq_max: usize,
    /// Threads to use at most; 0: as many as rayon has.
    pub n_threads: usize,
    /// How keys were rotated, so that [`Cache::shift`] can turn them. `None`: shifts leave the keys alone.
    pub rope: Option<Rope>,
}

/// How one layer attends.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttendOptions<'a> {
    /// Factor on the scores; 0: 1 / sqrt(head_dim_k).
    pub scale: f32,
    /// Soft cap of the scores; 0: none.
    pub softcap: f32,
    /// ALiBi; 0: none.
    pub max_bias: f32,
    /// Sliding window: newest keys visible, the current one included; 0: all.
    pub n_swa: u32,
    /// Learned sink logits, one per query head.
    pub sink_logits: Option<&'a [f32]>,
}

/// Packed K and V of all layers, and which token is where.
pub struct Cache {
    recipe: Recipe,
    params: CacheParams,
    planner: Planner,
    /// What `params.rope` amounts to.
    rotation: Option<Rotation>,
    cells: Cells,
    layers: Vec<Layer>,
    batch: Option<Batch>,
    /// A write stopped halfway: nothing can be said about the memory until it is cleared or loaded.
    broken: bool,
}

struct Layer {
    layout: Layout,
    k: Memory,
    v: Memory,
}

/// What lives from `begin` to `end`.
struct Batch {
    seq_ids: Vec<u32>,
    positions: Vec<i32>,
    plan: Vec<i32>,
    n_kv: usize,
    /// Per layer: attended and stored.
    done: Vec<bool>,
    masks: Vec<(MaskKind, MaskData)>,
}

impl Cache {
    /// An empty cache with the recipe that its size allows ([`Recipe::fit`]). All its memory is reserved here; nothing grows
    /// later but scratch space for a batch.
    pub fn new(recipe: &Recipe, params: &CacheParams) -> Result<Self> {
        for (name, value, max) in [
            ("n_layers", params.n_layers, MAX_LAYERS),
            ("n_cells", params.n_cells, i32::MAX as usize),
            ("n_seq_max", params.n_seq_max, MAX_SEQUENCES),
        ] {
            if !(1..=max).contains(&value) {
                return Err(Error::invalid(format!("{name} = {value}: use 1 to {max}")));
            }
        }
        params.shape.validate()?;
        if let Some(rope) = params.rope {
            rope.validate(params.shape.head_dim_k as usize)?;
        }
        let recipe = recipe.fit(params.n_cells, 1, params.n_seq_max);
        let planner = Planner::new(recipe.planner_config(params.n_cells, 1, params.n_seq_max))?;
        let layout = |layer| Layout::new(&recipe, params.shape, layer, params.n_cells, planner.n_slots());
        let layouts = (0..params.n_layers).map(layout).collect::<Result<Vec<_>>>()?;
        let total = layouts
            .iter()
            .try_fold(0usize, |total, layout| total.checked_add(layout.k_bytes())?.checked_add(layout.v_bytes()));
        memory::check_available(total.unwrap_or(usize::MAX))?;
        let layer =
            |layout: Layout| Layer { k: Memory::new(layout.k_bytes()), v: Memory::new(layout.v_bytes()), layout };
        Ok(Self {
            recipe,
            params: *params,
            rotation: params.rope.map(|rope| rope.rotation()).transpose()?,
            layers: layouts.into_iter().map(layer).collect(),
            cells: Cells::new(params.n_cells, params.n_seq_max),
            planner,
            batch: None,
            broken: false,
        })
    }

    /// Opens a batch: token i continues sequence `seq_ids[i]` at `positions[i]`. Positions of a sequence rise.
    /// [`Status::Full`] if there are not enough free cells. On failure nothing has changed.
    pub fn begin(&mut self, seq_ids: &[u32], positions: &[i32]) -> Result<()> {
        self.check_idle()?;
        if seq_ids.is_empty() || seq_ids.len() != positions.len() {
            let text =
                format!("{} sequence ids and {} positions: give one of each per token", seq_ids.len(), positions.len());
            return Err(Error::invalid(text));
        }
        let chosen = self.cells.find(seq_ids, positions)?;
        let tokens = positions.iter().zip(seq_ids);
        let rows: Vec<Row> = chosen.iter().zip(tokens).map(|(&cell, (&pos, &seq))| Row { cell, pos, seq }).collect();
        let config = self.planner.config();
        let mut plan = vec![0; plan_len(rows.len(), self.planner.n_slots(), config.n_cells, config.page)];
        let cells = &self.cells;
        self.planner.plan(STREAM, &rows, &|cell| cells.is_live(cell), &mut plan)?;
        self.cells.place(&chosen, seq_ids, positions);
        self.batch = Some(Batch {
            seq_ids: seq_ids.to_vec(),
            positions: positions.to_vec(),
            plan,
            n_kv: self.cells.n_scanned(),
            done: vec![false; self.layers.len()],
            masks: Vec::new(),
        });
        Ok(())
    }

    /// Attends one layer and then stores its rows. `q` is `[n_tokens][n_heads][head_dim_k]`, `k` and `v` are
    /// `[n_tokens][n_kv_heads][head_dim]`, `out` is `[n_tokens][n_heads][head_dim_v]`.
    pub fn attend(
        &mut self,
        layer: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        options: &AttendOptions,
        out: &mut [f32],
    ) -> Result<()> {
        self.check_sound()?;
        let n_layers = self.layers.len();
        let batch = self.batch.as_mut().ok_or_else(|| Error::invalid("no batch is open: begin one first"))?;
        match batch.done.get(layer) {
            Some(false) => {}
            Some(true) => return Err(Error::invalid(format!("layer {layer} has already been attended in this batch"))),
            None => return Err(Error::invalid(format!("layer {layer} does not exist: there are {n_layers}"))),
        }
        let n_tokens = batch.positions.len();
        let [q, k, v] = tensor_rows(&self.params.shape, n_tokens, [q, k, v], out)?;
        let kind = MaskKind { n_swa: options.n_swa, alibi: options.max_bias != 0.0 };
        if !batch.masks.iter().any(|(known, _)| *known == kind) {
            let data = MaskData::new(kind, &self.cells, batch.n_kv, &batch.seq_ids, &batch.positions);
            batch.masks.push((kind, data));
        }
        let mask = batch.masks.iter().find(|(known, _)| *known == kind).map(|(_, data)| data.as_mask());
        let n_threads = n_threads(&self.params);
        let memory = &mut self.layers[layer];
        let layout = &memory.layout;
        let args = AttendArgs {
            q,
            current: Some((k, v)),
            k_mem: memory.k.bytes(),
            v_mem: memory.v.bytes(),
            plan: Plan::new(&batch.plan)?,
            rotation: self.rotation.as_ref(),
            mask: mask.expect("made above"),
            mask_stride_token: batch.n_kv,
            n_kv: batch.n_kv,
            sink_logits: options.sink_logits,
            scale: scale(options, &self.params.shape),
            softcap: options.softcap,
            max_bias: options.max_bias,
            n_tokens,
            n_splits: attention::n_splits(layout, n_tokens, n_threads),
            with_lse: layout.attn_window() > 0,
        };
        let mut lse = vec![0.0; n_tokens * self.params.shape.n_heads as usize];
        attend_parts(layout, &args, n_threads, [&mut *out, &mut lse])?;
        let attended = Some(Attended { lse: &lse, scale: args.scale });
        self.broken = true;
        let rows = StoreRows {
            positions: Some(self.cells.pos()),
            k,
            v,
            q: Some(q),
            attended,
            rotation: self.rotation.as_ref(),
        };
        store_layer(memory, &rows, &Plan::new(&batch.plan)?, n_threads)?;
        self.broken = false;
        batch.done[layer] = true;
        Ok(())
    }

    /// Tokens of the open batch.
    pub fn batch_tokens(&self) -> Result<usize> {
        let batch = self.batch.as_ref().ok_or_else(|| Error::invalid("no batch is open: begin one first"))?;
        Ok(batch.positions.len())
    }

    /// Closes the batch. Fails, and leaves it open, if a layer has not been attended.
    pub fn end(&mut self) -> Result<()> {
        self.check_sound()?;
        let batch = self.batch.as_ref().ok_or_else(|| Error::invalid("no batch is open"))?;
        if let Some(layer) = batch.done.iter().position(|done| !done) {
            return Err(Error::invalid(format!("layer {layer} has not been attended in this batch")));
        }
        self.batch = None;
        Ok(())
    }

    /// Removes the positions `[start, end)` of a sequence, or of all sequences (`None`). A negative start is 0, a
    /// negative end is no end.
    pub fn remove(&mut self, seq: Option<u32>, start: i32, end: i32) -> Result<()> {
        self.check_idle()?;
        seq.map_or(Ok(()), |seq| self.cells.check_sequence(seq))?;
        self.cells.remove(seq.map(|seq| seq as usize), &cells::positions(start, end));
        Ok(())
    }

    /// Makes sequence `dst` share what `src` holds in a range of positions; what `dst` held there is removed.
    pub fn copy(&mut self, src: u32, dst: u32, start: i32, end: i32) -> Result<()> {
        self.check_idle()?;
        self.cells.check_sequence(src)?;
        self.cells.check_sequence(dst)?;
        self.cells.copy(src as usize, dst as usize, &cells::positions(start, end));
        Ok(())
    }

    /// Removes all sequences but one.
    pub fn keep(&mut self, seq: u32) -> Result<()> {
        self.check_idle()?;
        self.cells.check_sequence(seq)?;
        self.cells.keep(seq as usize);
        Ok(())
    }

    /// Adds `delta` to the positions `[start, end)` of a sequence, and turns their keys if the cache knows its
    /// [`Rope`], which loses nothing: packed rows stay as they are. Fails, with nothing changed, if a cell in the range is
    /// shared with another sequence or a position would be negative or taken.
    pub fn shift(&mut self, seq: u32, start: i32, end: i32, delta: i32) -> Result<()> {
        self.check_idle()?;
        self.cells.check_sequence(seq)?;
        let moved = self.cells.shiftable(seq as usize, &cells::positions(start, end), delta)?;
        if moved.is_empty() || delta == 0 {
            return Ok(());
        }
        self.turn_keys(&moved, delta)?;
        self.cells.shift(&moved, delta);
        Ok(())
    }

    /// Forgets everything, an open batch included.
    pub fn clear(&mut self) -> Result<()> {
        self.batch = None;
        self.broken = true;
        self.planner.reset(STREAM)?;
        self.cells = Cells::new(self.params.n_cells, self.params.n_seq_max);
        for layer in &mut self.layers {
            layer.k.bytes_mut().fill(0);
            layer.v.bytes_mut().fill(0);
        }
        self.broken = false;
        Ok(())
    }

    /// Cells that hold a token.
    pub fn n_tokens(&self) -> usize {
        self.cells.n_used()
    }

    /// Smallest and largest position of a sequence, `None` if it is empty.
    pub fn sequence_range(&self, seq: u32) -> Result<Option<(i32, i32)>> {
        self.cells.check_sequence(seq)?;
        Ok(self.cells.range(seq as usize))
    }

    /// Bytes of K and V memory of all layers, exact rows and metadata included, free cells too.
    pub fn n_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.layout.k_bytes() + layer.layout.v_bytes()).sum()
    }

    /// What the cache was made for.
    pub fn params(&self) -> &CacheParams {
        &self.params
    }

    fn check_idle(&self) -> Result<()> {
        self.check_sound()?;
        if self.batch.is_some() {
            return Err(Error::invalid("a batch is open: attend its remaining layers and end it first"));
        }
        Ok(())
    }

    fn check_sound(&self) -> Result<()> {
        if self.broken {
            return Err(Error::new(
                Status::Internal,
                "an earlier failure left the cache half-written: clear it or load a state",
            ));
        }
        Ok(())
    }
}

fn n_threads(params: &CacheParams) -> usize {
    if params.n_threads == 0 {
        parallel::n_threads()
    } else {
        params.n_threads
    }
}

fn scale(options: &AttendOptions, shape: &Shape) -> f32 {
    if options.scale == 0.0 {
        1.0 / (shape.head_dim_k as f32).sqrt()
    } else {
        options.scale
    }
}

/// Checks the lengths of q, k, v and out, which are contiguous, and gives the first three their strides.
fn tensor_rows<'a>(shape: &Shape, n_tokens: usize, tensors: [&'a [f32]; 3], out: &[f32]) -> Result<[Rows<'a>; 3]> {
    let sizes = [
        ("q", shape.n_heads, shape.head_dim_k),
        ("k", shape.n_kv_heads, shape.head_dim_k),
        ("v", shape.n_kv_heads, shape.head_dim_v),
        ("out", shape.n_heads, shape.head_dim_v),
    ];
    let lens = tensors.map(<[f32]>::len).into_iter().chain([out.len()]);
    for ((name, heads, dim), len) in sizes.into_iter().zip(lens) {
        let want = n_tokens * heads as usize * dim as usize;
        if len != want {
            return Err(Error::invalid(format!("{name} has {len} values, {n_tokens} tokens have {want}")));
        }
    }
    let mut sizes = sizes.into_iter();
    Ok(tensors.map(|data| {
        let (_, heads, dim) = sizes.next().expect("one per tensor");
        let (heads, dim) = (heads as usize, dim as usize);
        Rows { data, stride_token: heads * dim, stride_head: dim }
    }))
}

/// `out` are rows and logarithms of denominators.
fn attend_parts(layout: &Layout, args: &AttendArgs, n_threads: usize, out: [&mut [f32]; 2]) -> Result<()> {
    if args.n_splits <= 1 {
        return collect_parts(n_threads, out, |part, emit| attention::attend(layout, args, part, n_threads, emit));
    }
    let shape = layout.shape();
    let mut partial =
        vec![0.0; args.n_splits * args.n_tokens * shape.n_heads as usize * (shape.head_dim_v as usize + 2)];
    collect_parts(n_threads, [&mut partial, &mut []], |part, emit| {
        attention::attend(layout, args, part, n_threads, emit)
    })?;
    collect_parts(n_threads, out, |part, emit| {
        let (n_splits, with_lse) = (args.n_splits, args.with_lse);
        let (sinks, n) = (args.sink_logits, args.n_tokens);
        attention::combine(layout, &partial, sinks, n_splits, n, with_lse, part, n_threads, emit)
    })
}

/// A function that is handed ranges of an output: offset and values.
type Emit<'a> = dyn FnMut(usize, &[f32]) + 'a;

/// Runs a part per thread. Parts emit a row at a time, seldom enough to take turns. The second output follows the first.
fn collect_parts(
    n_parts: usize,
    out: [&mut [f32]; 2],
    run: impl Fn(usize, &mut Emit) -> Result<()> + Sync,
) -> Result<()> {
    let out = Mutex::new(out);
    parallel::for_each(n_parts, (0..n_parts).collect(), |part| {
        run(part, &mut |offset, row| {
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            let [rows, behind] = &mut *out;
            match offset.checked_sub(rows.len()) {
                None => rows[offset..][..row.len()].copy_from_slice(row),
                Some(offset) => behind[offset..][..row.len()].copy_from_slice(row),
            }
        })
    })
}

fn store_layer(layer: &mut Layer, rows: &StoreRows, plan: &Plan, n_threads: usize) -> Result<()> {
    let Layer { layout, k, v } = layer;
    let layout = &*layout;
    let keys = k.bytes_mut().chunks_exact_mut(layout.head_bytes(Side::Key));
    let values = v.bytes_mut().chunks_exact_mut(layout.head_bytes(Side::Value));
    let units = keys.zip(values).enumerate().collect();
    parallel::for_each(n_threads, units, |(head, (key, value))| {
        store::store_head(layout, head, [key, value], rows, plan)
    })
}
