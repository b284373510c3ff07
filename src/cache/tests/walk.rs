//! A random walk over a cache on real memory, for every recipe: appends, removals of tails and middles, reuse, shifts,
//! copies within and across streams, saved states and sequences, beside a shadow in full precision. Before each batch is attended,
//!
//! * every live cell is read from exactly one place in every head, the outlier pool included, and the cells of the batch
//!   from none;
//! * the rows are those of the shadow: to the bit (of FP16) where the cache keeps them exact, nearly so in pages;
//! * what attention makes of them is what the oracle does.
//!
//! Rows that are decoded and encoded again are compared then, and the shadow takes them: errors of one coding do not add up.
//!
//! Odd seeds have one stream that four sequences share, even ones two streams of one sequence each.
//!
//! `KVQ_WALK_SEEDS` and `KVQ_WALK_OPS` set how far it goes; `KVQ_WALK_SEED` walks that one only. `--nocapture` shows where it is.

mod moves;

use std::time::Instant;

use super::*;
use crate::head::Head;
use crate::location::{Location, IN_PAGE, IN_SLOT};
use crate::plan::{Seal, View};
use crate::planner::PlannerConfig;
use crate::pool;
use crate::recipe::presets::PRESETS;
use crate::recipe::METHODS;
use crate::rows::finite;
use crate::store;
use crate::tests::profile;

const N_CELLS: usize = 320;
const N_SEQS: usize = 4;
/// Largest squared error of a packed row, in parts of the row's or of an ordinary one's; another row would have about 2.
const MOST_ERROR: f64 = 1.0;
/// Mean square of the values of an ordinary row, by [`Rng::values`].
const POWER: f64 = 1.0;
/// Of the appends, one in so many is compared in full; the places of cells are counted each time.
const FULL_CHECK: usize = 4;

#[test]
fn every_recipe_walks() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let short = if cfg!(debug_assertions) { (2, 60) } else { (3, 120) };
    let (n_seeds, n_ops) =
        (number("KVQ_WALK_SEEDS").unwrap_or(short.0), number("KVQ_WALK_OPS").unwrap_or(short.1) as usize);
    let seeds = match number("KVQ_WALK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..n_seeds + 1,
    };
    let specs = specs();
    for seed in seeds {
        let start = Instant::now();
        specs.iter().for_each(|spec| walk(spec, seed, n_ops));
        println!("seed {seed}: {n_ops} operations on each of {} recipes, {:.0?}", specs.len(), start.elapsed());
    }
}

/// Every preset and every method with its defaults and its published setting, made small so that little data reaches every
/// path, and forms that take other ways through the planner, the pool or the codecs.
fn specs() -> Vec<String> {
    let of_method = METHODS.iter().flat_map(|method| {
        let pool = if method.name == "ott" { ",skip-layers=0" } else { "" };
        let settings = if method.paper.is_some() { &["", "paper,"][..] } else { &[""] };
        settings.iter().map(move |setting| format!("{}:{setting}page=64,window=32{pool}", method.name))
    });
    let more = [
        "skvq:k=8,v=8,page=64,window=0,sinks=0",
        "skvq:k=1.6,v=3,page=128,window=70,sinks=9",
        "ott:k=4,v=8,skip-layers=0,page=64,window=80,sinks=0,outliers=6,pool=20",
        "ott:skip-layers=0,page=64,window=0,outliers=1,pool=0",
        "kivi:k=2.5,page=64,window=9,sinks=64",
        "qaq:bits=3,page=64,window=64,attn-window=64,attn-keys=1,outliers=2",
    ];
    let of_preset = PRESETS.iter().map(|preset| format!("{}:page=64,window=32", preset.name));
    of_preset.chain(of_method).chain(more.map(String::from)).collect()
}

/// A token as the cache should know it.
#[derive(Clone)]
struct Held {
    pos: i32,
    /// A bit per sequence.
    seqs: u64,
    /// Key, not rotated, and value.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Shifts that turned its key.
    turns: usize,
}

struct Walk {
    cache: Cache,
    /// Sequences of the stream.
    n_seqs: usize,
    /// The other stream, if there are two.
    parked: Option<moves::Parked>,
    rope: Rope,
    /// By cell.
    shadow: Vec<Option<Held>>,
    rng: Rng,
    /// What has been done, for messages.
    what: String,
    /// Bound on the normalised error of outputs beside the oracle on the rows that the cache holds.
    bound: f64,
}

fn walk(spec: &str, seed: u64, n_ops: usize) {
    // Published settings have groups of up to 128 channels.
    let dim = if spec.contains("paper") { 128 } else { 64 };
    let shape = Shape { n_heads: 2, n_kv_heads: 1, head_dim_k: dim, head_dim_v: dim };
    let recipe = profile::parse(spec, shape);
    let rope = Rope { n_rot: 32, freq_base: 1e4, freq_scale: 1.0, interleaved: false };
    let params =
        CacheParams { shape, n_layers: 1, n_cells: N_CELLS, n_seq_max: N_SEQS, n_threads: 1, rope: Some(rope) };
    let (n_seqs, n_streams) = if seed % 2 == 1 { (N_SEQS, 1) } else { (1, moves::N_STREAMS) };
    let params = CacheParams { n_seq_max: n_seqs, ..params };
    let cache = new_cache(&recipe, &params, n_streams);
    let bound = crate::codec::REGISTRY.iter().map(|codec| codec.nmse).fold(0.0, f64::max);
    let (shadow, rng) = (vec![None; N_CELLS], Rng::new(seed));
    let mut walk = Walk { cache, n_seqs, parked: None, rope, shadow, rng, what: String::new(), bound: 4.0 * bound };
    walk.parked = (n_streams > 1).then(|| walk.parked_now());
    for op in 0..n_ops {
        walk.what = format!("{spec}, KVQ_WALK_SEED={seed}, operation {op}");
        walk.step();
        walk.check_cells();
    }
}

/// A cache for so many streams: its planner knows them, its memory is that of one.
fn new_cache(recipe: &Recipe, params: &CacheParams, n_streams: usize) -> Cache {
    let mut cache = Cache::new(recipe, params).unwrap();
    let config = *cache.planner.config();
    cache.planner = Planner::new(PlannerConfig { n_streams, ..config }).unwrap();
    assert_eq!(cache.planner.n_slots(), cache.layers[0].layout.n_slots());
    cache
}

impl Walk {
    fn step(&mut self) {
        let seq = self.rng.below(self.n_seqs);
        match self.rng.below(43) {
            40 => self.use_streams(),
            41..=42 => self.move_sequence(seq),
            0..=21 => self.append(seq),
            22..=27 => {
                let last = self.last(seq);
                let from = (last - [2, 12, 40, 100][self.rng.below(4)].min(1 + self.rng.below(100) as i32)).max(0);
                self.remove(Some(seq), from, -1);
            }
            28..=29 => {
                let from = self.rng.below(1 + self.last(seq).max(0) as usize) as i32;
                let n = 1 + self.rng.below(60) as i32;
                self.remove(Some(seq), from, from + n);
            }
            30 => {
                let from = self.rng.below(1 + self.last(seq).max(0) as usize) as i32;
                let n = 1 + self.rng.below(20) as i32;
                self.remove(None, from, from + n);
            }
            31 => self.remove(Some(seq), 0, -1),
            32..=34 => self.drop_behind_the_first(seq),
            35..=36 => self.copy(seq),
            37 => self.save_and_load(),
            38 if self.rng.below(4) == 0 => {
                self.what += &format!(", keep {seq}");
                self.cache.keep(seq as u32).unwrap();
                self.change(|token| token.seqs &= 1 << seq);
            }
            39 if self.rng.below(8) == 0 => {
                self.cache.clear().unwrap();
                self.shadow.fill(None);
            }
            _ => self.shift(seq),
        }
    }

    fn last(&self, seq: usize) -> i32 {
        self.cache.sequence_range(seq as u32).unwrap().map_or(-1, |(_, last)| last)
    }

    /// Applies a change to all tokens and forgets those that no sequence holds any more.
    fn change(&mut self, mut change: impl FnMut(&mut Held)) {
        for cell in &mut self.shadow {
            cell.as_mut().into_iter().for_each(&mut change);
            if cell.as_ref().is_some_and(|token| token.seqs == 0) {
                *cell = None;
            }
        }
    }

    fn remove(&mut self, seq: Option<usize>, start: i32, end: i32) {
        self.what += &format!(", remove {start}..{end} of {seq:?}");
        self.cache.remove(seq.map(|seq| seq as u32), start, end).unwrap();
        let range = start..if end < 0 { i32::MAX } else { end };
        let gone = seq.map_or(u64::MAX, |seq| 1 << seq);
        self.change(|token| {
            if range.contains(&token.pos) {
                token.seqs &= !gone;
            }
        });
    }

    fn copy(&mut self, src: usize) {
        let dst = self.rng.below(self.n_seqs);
        let start = self.rng.below(1 + self.last(src).max(0) as usize / 2) as i32;
        let end = start + self.rng.below(200) as i32;
        self.what += &format!(", copy {start}..{end} of {src} to {dst}");
        self.cache.copy(src as u32, dst as u32, start, end).unwrap();
        if src == dst {
            return;
        }
        let range = start..end;
        self.change(|token| {
            if range.contains(&token.pos) {
                token.seqs = token.seqs & !(1 << dst) | (token.seqs >> src & 1) << dst;
            }
        });
    }

    /// What a context does when it is full.
    fn drop_behind_the_first(&mut self, seq: usize) {
        let last = self.last(seq);
        let n = 1 + self.rng.below(40) as i32;
        if last < 4 + n {
            return;
        }
        self.remove(Some(seq), 4, 4 + n);
        self.shift_by(seq, 4 + n, -n);
    }

    fn shift(&mut self, seq: usize) {
        let start = self.rng.below(1 + self.last(seq).max(0) as usize) as i32;
        let delta = 1 + self.rng.below(30) as i32;
        self.shift_by(seq, start, delta);
    }

    fn shift_by(&mut self, seq: usize, start: i32, delta: i32) {
        self.what += &format!(", shift {seq} from {start} by {delta}");
        let moves = |token: &Held| token.seqs >> seq & 1 == 1 && token.pos >= start;
        let is_shared = self.shadow.iter().flatten().any(|token| moves(token) && token.seqs != 1 << seq);
        let stays =
            |pos: i32| self.shadow.iter().flatten().any(|t| t.seqs >> seq & 1 == 1 && !moves(t) && t.pos == pos);
        let collides = self.shadow.iter().flatten().any(|token| moves(token) && stays(token.pos + delta));
        // By how much page rows will have moved, unless their page is encoded again.
        let mut turned: Vec<i32> =
            self.cache.planner.locate(STREAM).unwrap().iter().map(|location| location.turned).collect();
        let moved = self.shadow.iter().zip(&mut turned).filter(|(token, _)| token.as_ref().is_some_and(moves));
        moved.for_each(|(_, turned)| *turned += delta);
        let result = self.cache.shift(seq as u32, start, -1, delta);
        assert_eq!(result.is_err(), is_shared || collides, "{}: {result:?}", self.what);
        if result.is_ok() {
            self.change(|token| {
                if token.seqs >> seq & 1 == 1 && token.pos >= start {
                    token.pos += delta;
                    token.turns += 1;
                }
            });
            let location = self.cache.planner.locate(STREAM).unwrap();
            let is_recoded = |cell: usize| {
                self.shadow[cell].is_some() && location[cell].in_page() && location[cell].turned != turned[cell]
            };
            let page = self.cache.recipe.page;
            let pages: Vec<usize> = (0..N_CELLS).filter(|cell| is_recoded(*cell)).map(|cell| cell / page).collect();
            self.take_recoded(|cell| pages.contains(&(cell / page)));
        }
    }

    /// Makes the rows that were decoded and encoded again what the shadow holds from now on, if they are as near as those that
    /// are encoded once.
    fn take_recoded(&mut self, is_recoded: impl Fn(usize) -> bool) {
        let location = self.cache.planner.locate(STREAM).unwrap();
        let members = self.members(Side::Key);
        for cell in (0..N_CELLS).filter(|cell| is_recoded(*cell) && !members.contains(cell)) {
            if self.shadow[cell].is_some() && location[cell].places == IN_PAGE {
                self.shadow[cell] = Some(self.save_token(cell, true, &location).held);
            }
        }
    }

    /// The pages that a plan makes anew, and the cells whose rows it encodes.
    fn renewed(plan: &Plan) -> (Vec<usize>, Vec<usize>) {
        let renewed =
            plan.records().filter(|record| record.seal == Seal::Renew).map(|record| record.cell / plan.page());
        (renewed.collect(), plan.records().map(|record| record.cell).collect())
    }

    /// As [`Walk::take_recoded`] after a plan with these [`Walk::renewed`] pages.
    fn take_renewed(&mut self, (pages, recorded): (Vec<usize>, Vec<usize>)) {
        let page = self.cache.recipe.page;
        self.take_recoded(|cell| pages.contains(&(cell / page)) && !recorded.contains(&cell));
    }

    /// Goes on with a cache that was made anew, or with the same one.
    fn save_and_load(&mut self) {
        self.what += ", save and load";
        let mut bytes = vec![0; self.cache.state_bytes().unwrap()];
        self.cache.save_memory(&mut bytes).unwrap();
        self.change_cache(|walk| {
            if walk.rng.below(2) == 0 {
                let n_streams = walk.cache.planner.config().n_streams;
                walk.cache = new_cache(&walk.cache.recipe, &walk.cache.params, n_streams);
            }
            walk.cache.load_memory(&bytes).unwrap();
        });
    }

    /// One batch, of one sequence or, now and then, of two.
    fn append(&mut self, seq: usize) {
        let free = N_CELLS - self.cache.n_tokens();
        let n = [1, 1, 1 + self.rng.below(6), 1 + self.rng.below(90), 64][self.rng.below(5)].min(free);
        if n == 0 {
            return;
        }
        let other = if self.rng.below(5) == 0 { self.rng.below(self.n_seqs) } else { seq };
        let mut next: Vec<i32> = (0..self.n_seqs).map(|seq| self.last(seq) + 1).collect();
        let seqs: Vec<u32> = (0..n).map(|i| if i % 3 == 2 { other } else { seq } as u32).collect();
        let positions: Vec<i32> = seqs
            .iter()
            .map(|&seq| {
                next[seq as usize] += 1;
                next[seq as usize] - 1
            })
            .collect();
        self.what += &format!(", append {n} to {seq} and {other}");
        self.cache.begin(&seqs, &positions).unwrap();
        let shape = self.cache.params.shape;
        let (dim_k, dim_v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
        let tokens: Vec<Held> = seqs
            .iter()
            .zip(&positions)
            .map(|(&seq, &pos)| {
                // Now and then a small key, as outlier tokens have it.
                let size = if self.rng.below(20) == 0 { 0.05 } else { 1.0 };
                let k = self.rng.values(dim_k).iter().map(|x| x * size).collect();
                Held { pos, seqs: 1 << seq, k, v: self.rng.values(dim_v), turns: 0 }
            })
            .collect();
        let q = self.rng.values(n * shape.n_heads as usize * dim_k);
        let k: Vec<f32> = tokens.iter().flat_map(|token| self.turned(token)).collect();
        let v: Vec<f32> = tokens.iter().flat_map(|token| token.v.clone()).collect();
        let cells = self.check_places();
        for (cell, token) in cells.into_iter().zip(tokens) {
            self.shadow[cell] = Some(token);
        }
        let want = (self.rng.below(FULL_CHECK) == 0).then(|| self.check_rows(&q, &k, &v));
        let mut out = vec![f32::NAN; n * shape.n_heads as usize * dim_v];
        self.cache.attend(0, &q, &k, &v, &AttendOptions::default(), &mut out).unwrap();
        if let Some(want) = want {
            let error = reference::nmse(&out, &want);
            assert!(error <= self.bound, "{}: outputs differ from the oracle's, NMSE {error:.1e}", self.what);
        }
        let renewed = Self::renewed(&Plan::new(&self.cache.batch.as_ref().unwrap().plan).unwrap());
        self.cache.end().unwrap();
        self.take_renewed(renewed);
    }

    /// A token's key as it is at its position.
    fn turned(&self, token: &Held) -> Vec<f32> {
        let mut k = token.k.clone();
        let (rotation, mut angles) = (self.rope.rotation().unwrap(), Default::default());
        rotation.angles(token.pos, &mut angles);
        rotation.turn(&mut k, &angles);
        k
    }

    /// Positions and sequences are the shadow's.
    fn check_cells(&self) {
        let cells = &self.cache.cells;
        for (cell, token) in self.shadow.iter().enumerate() {
            let want = token.as_ref().map_or((0, 0), |token| (token.pos, token.seqs));
            assert_eq!((cells.pos()[cell], cells.seqs()[cell]), want, "{}: cell {cell}", self.what);
        }
    }

    /// Counts where attention will read each cell of the open batch; gives the cells of its rows.
    fn check_places(&self) -> Vec<usize> {
        let plan = Plan::new(&self.cache.batch.as_ref().unwrap().plan).unwrap();
        plan.check_entries().unwrap();
        let rows: Vec<usize> = plan.row_cells().iter().map(|cell| *cell as usize).collect();
        for side in [Side::Key, Side::Value] {
            let members: Vec<usize> = self.members(side);
            let mut distinct = members.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), members.len(), "{}: a cell is in the pool twice: {members:?}", self.what);
            for cell in 0..N_CELLS {
                let in_slots = plan.slot_cells(View::Before).iter().filter(|held| **held == cell as i32).count();
                let in_page = usize::from(page_bit(&plan, cell));
                // A member is read from the pool instead of its page.
                let n_places = in_slots + in_page * members.iter().filter(|member| **member == cell).count().max(1);
                let want = match &self.shadow[cell] {
                    _ if rows.contains(&cell) => 0,
                    Some(_) => 1,
                    // Hidden by the mask, but in one place at most.
                    None => n_places.min(1),
                };
                assert_eq!(n_places, want, "{}: places of cell {cell} on side {side:?}", self.what);
            }
        }
        assert_eq!(self.members(Side::Key), self.members(Side::Value), "{}: pools of keys and values", self.what);
        rows
    }

    fn members(&self, side: Side) -> Vec<usize> {
        let (layout, region) = self.region(side);
        pool::cells(Head::new(layout, side, region)).flatten().collect()
    }

    /// The rows of some cells, as they are read.
    fn decoded(&self, side: Side, location: &[Location], cells: std::ops::Range<usize>) -> Vec<f32> {
        let [(layout, keys), (_, values)] = [Side::Key, Side::Value].map(|side| self.region(side));
        let mut rows = vec![0f32; cells.len() * layout.side(side).head_dim];
        let rotation = self.cache.rotation.as_ref();
        match side {
            Side::Key => store::dequantize_head(layout, side, keys, location, rotation, cells, &mut rows).unwrap(),
            Side::Value => store::dequantize_values(layout, [keys, values], location, cells, &mut rows).unwrap(),
        }
        rows
    }

    /// The only head of the only layer.
    fn region(&self, side: Side) -> (&crate::layout::Layout, &[u8]) {
        let layer = &self.cache.layers[0];
        let region = if side == Side::Key { layer.k.bytes() } else { layer.v.bytes() };
        (&layer.layout, region)
    }

    /// Compares the rows that the cache holds with the shadow's and gives what the oracle makes of them.
    fn check_rows(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
        let batch = self.cache.batch.as_ref().unwrap();
        let plan = Plan::new(&batch.plan).unwrap();
        let mut location = vec![Location::default(); N_CELLS];
        for cell in (0..N_CELLS).filter(|&cell| page_bit(&plan, cell)) {
            location[cell] = Location { places: IN_PAGE, slot: 0, turned: plan.turned(cell) };
        }
        for (slot, &cell) in plan.slot_cells(View::Before).iter().enumerate().filter(|(_, cell)| **cell >= 0) {
            location[cell as usize] = Location { places: IN_SLOT, slot: slot as u32, turned: 0 };
        }
        let rows: Vec<usize> = plan.row_cells().iter().map(|cell| *cell as usize).collect();
        let mut held: Vec<Vec<f32>> = Vec::new();
        for (side, new) in [(Side::Key, k), (Side::Value, v)] {
            let (layout, _) = self.region(side);
            let (dim, members) = (layout.side(side).head_dim, self.members(side));
            let mut found = self.decoded(side, &location, 0..N_CELLS);
            for (cell, token) in self.shadow.iter().enumerate() {
                let (Some(token), false) = (token, rows.contains(&cell)) else { continue };
                let is_exact = location[cell].slot().is_some() || members.contains(&cell);
                let truth = if side == Side::Key { self.turned(token) } else { token.v.clone() };
                let turns = if side == Side::Key { token.turns } else { 0 };
                self.check_row(
                    &found[cell * dim..][..dim],
                    &truth,
                    is_exact,
                    turns,
                    &format!("{side:?} of cell {cell}"),
                );
            }
            for (row, &cell) in rows.iter().enumerate() {
                found[cell * dim..][..dim].copy_from_slice(&new[row * dim..][..dim]);
            }
            held.push(found);
        }
        self.oracle(&rows, q, [&held[0], &held[1]])
    }

    fn check_row(&self, found: &[f32], truth: &[f32], is_exact: bool, turns: usize, row: &str) {
        let half: Vec<f64> = truth.iter().map(|x| half::f16::from_f32(finite(*x)).to_f64()).collect();
        let error = reference::nmse(found, &half);
        if is_exact {
            // Every turn of an exact key rounds once more, and so does its angle.
            let bound = 1e-5 * turns as f64;
            assert!(error <= bound, "{}: exact {row} differs, NMSE {error:.1e}, {turns} turns", self.what);
        } else {
            // Small keys among large ones may get lost; what must not be there is the row of another token.
            let error = found.iter().zip(&half).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
            let power = half.iter().map(|x| x * x).sum::<f64>() / half.len() as f64;
            let error = error / (power.max(POWER) * found.len() as f64);
            assert!(error <= MOST_ERROR, "{}: packed {row} is another, error {error:.2}, {turns} turns", self.what);
        }
    }

    fn oracle(&self, rows: &[usize], q: &[f32], [k, v]: [&[f32]; 2]) -> Vec<f64> {
        let shape = self.cache.params.shape;
        let (heads, dim_k, dim_v) = (shape.n_heads as usize, shape.head_dim_k as usize, shape.head_dim_v as usize);
        let mut out = Vec::new();
        for (index, &row) in rows.iter().enumerate() {
            let own = self.shadow[row].as_ref().unwrap();
            let bias = |token: &Option<Held>| match token {
                Some(token) if token.seqs & own.seqs != 0 && token.pos <= own.pos => 0.0,
                _ => f64::NEG_INFINITY,
            };
            let bias: Vec<f64> = self.shadow.iter().map(bias).collect();
            for q in q[index * heads * dim_k..][..heads * dim_k].chunks_exact(dim_k) {
                let scale = 1.0 / (dim_k as f64).sqrt();
                let query = reference::Query { q, scale, softcap: 0.0, bias: &bias, sink_logit: None };
                out.extend(reference::attention(&query, k, v, dim_v).0);
            }
        }
        out
    }
}

/// Whether a cell is read from its page, or from the pool instead of it.
fn page_bit(plan: &Plan, cell: usize) -> bool {
    let bits = plan.page_bits(View::Before, cell / plan.page());
    bits[cell % plan.page() / crate::plan::CELLS_PER_WORD] >> (cell % crate::plan::CELLS_PER_WORD) & 1 == 1
}
