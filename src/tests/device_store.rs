//! The store step on a device against the scalar path: after every ubatch the same bytes everywhere, what was learned, the
//! ring of queries and the outlier pool included. Devices are those of `device.rs`.

use std::collections::BTreeSet;
use std::time::Instant;

use half::f16;

use super::layer::{device_recipes, Layer, Ubatch, SCALE};
use super::random::Rng;
use crate::codec::page::Side;
use crate::cuda::attend::Workspace;
use crate::cuda::dequantize;
use crate::cuda::desc::{AttendCall, RotationDesc, StoreCall, StreamDesc};
use crate::cuda::lab::{Buffer, Lab};
use crate::cuda::store::{enqueue, workspace_bytes};
use crate::cuda::Call;
use crate::error::{Result, Status};
use crate::head::{Head, HeadMut};
use crate::plan::{Plan, Seal};
use crate::pool;
use crate::rotation::Rotation;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

fn shape(n_kv_heads: u32, gqa: u32, head_dim_k: u32, head_dim_v: u32) -> Shape {
    Shape { n_heads: n_kv_heads * gqa, n_kv_heads, head_dim_k, head_dim_v }
}

/// What memory holds before its first row.
const POISON: u8 = 0xa5;

/// A layer twice: in the CPU's memory and in a device's.
pub(super) struct Twin<'a> {
    lab: &'a Lab,
    pub(super) layer: Layer,
    memory: [Buffer; 2],
    workspace: Buffer,
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
        Self { lab, layer, memory, workspace }
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
        self.memory[0] = self.lab.upload(&self.layer.memory[0]);
    }

    fn call(&self, rows: &[Buffer; 5], ints: &[i32], learns: Learns) -> Call<StoreCall> {
        let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = self.layer.layout.shape();
        let [q, k, v, lse, plan] = rows.each_ref().map(Buffer::pointer);
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
            rows: std::ptr::null_mut(),
            notes: std::ptr::null_mut(),
            note_stride: 0,
            n_pages: 0,
            row_stride: 0,
            phases: 0,
            n_key_blocks: 1,
            n_value_blocks: 0,
            scale: SCALE,
            n_tokens: Plan::new(ints).unwrap().n_tokens() as u32,
            streams: StreamDesc::default(),
        };
        Call { call, rotation: self.rotation(), n_streams: 1, plan_len: ints.len() }
    }

    fn rotation(&self) -> RotationDesc {
        self.layer.rotation.as_ref().map_or_else(RotationDesc::default, Rotation::describe)
    }

    /// Stores a ubatch in both and says where they differ.
    pub(super) fn store(&mut self, ints: &[i32], ubatch: &Ubatch, lse: &[f32], learns: Learns) -> Option<String> {
        let lab = self.lab;
        let floats = |x: &[f32]| lab.upload(x);
        let rows = [floats(&ubatch.q), floats(&ubatch.k), floats(&ubatch.v), floats(lse), lab.upload(ints)];
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
        let read = Call { call: read, rotation: self.rotation(), n_streams: 1, plan_len };
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

/// What a walk has done.
#[derive(Default)]
struct Walked {
    /// Rows that were encoded.
    sealed: usize,
    /// Pages that were made anew.
    fresh: usize,
    /// Rows that were turned back first.
    turned: usize,
}

/// Random appends, removals and reuse of cells, with positions that move if `shifts`.
fn walk(lab: &Lab, spec: &str, shape: Shape, n_cells: usize, steps: usize, shifts: bool) -> Walked {
    let mut twin = Twin::new(lab, spec, shape, n_cells);
    if shifts {
        twin.rotate(shape.n_heads.is_multiple_of(2));
    }
    let page = twin.layer.layout.page();
    let mut rng = Rng::new(spec.len() as u64 * 7919 + u64::from(shape.n_heads) * 131 + u64::from(shape.head_dim_k));
    let (mut position, mut walked) = (0, Walked::default());
    for step in 0..steps {
        let cells = match step {
            // Enough for some pages first.
            0 => (0..2 * page + 40).collect(),
            1 => (2 * page + 40..3 * page).collect(),
            _ => next_cells(&mut rng, &mut twin.layer, page),
        };
        let ints = twin.layer.plan_cells(&cells, position);
        position += cells.len();
        let mut ubatch = twin.layer.ubatch(&mut rng, cells.len());
        spoil(&mut rng, &shape, &mut ubatch, step > 1);
        let lse = denominators(&mut rng, cells.len() * shape.n_heads as usize);
        let learns = [Learns::Everything, Learns::Everything, Learns::Queries, Learns::Nothing][rng.below(4)];
        let plan = Plan::new(&ints).unwrap();
        let fresh = plan.records().filter(|record| record.seal == Seal::Fresh).map(|record| record.cell / page);
        walked.sealed += plan.records().len();
        walked.fresh += fresh.collect::<BTreeSet<usize>>().len();
        walked.turned += plan.records().filter(|r| r.seal != Seal::Fresh && plan.turned(r.cell) != 0).count();
        if let Some(difference) = twin.store(&ints, &ubatch, &lse, learns) {
            panic!("{}: {spec} {shape:?} {n_cells} cells, step {step}, {} rows: {difference}", lab.name(), cells.len());
        }
        if shifts && step % 3 == 2 {
            twin.shift(&mut rng);
        }
    }
    walked
}

/// Walks through every recipe and prints what it did.
fn walk_all(specs: &[String], shapes: &[Shape], steps: usize) {
    for lab in Lab::all() {
        for spec in specs {
            for &shape in shapes.iter().filter(|shape| Layer::fits(spec, **shape)) {
                let (start, page) = (Instant::now(), Layer::page_of(spec));
                let Walked { sealed, fresh, .. } = walk(&lab, spec, shape, 5 * page + 11, steps, false);
                assert!(sealed > page && fresh > 1, "{spec}: {sealed} rows in {fresh} pages tell too little");
                let ms = start.elapsed().as_millis();
                let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = shape;
                println!(
                    "{:12} {spec:48} {n_heads:3}/{n_kv_heads} {head_dim_k:3}/{head_dim_v:3} {sealed:6} rows, {fresh:3} fresh pages, {ms:6} ms",
                    lab.name()
                );
            }
        }
    }
}

/// Microseconds of a call: one token that goes to a slot, and a page that is sealed. For a GPU that does nothing else:
/// `cargo test --release --features cuda times_of_a_layer -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn times_of_a_layer() {
    const CALLS: u32 = 200;
    for lab in Lab::all() {
        for spec in ["skvq:k=2,v=2", "kivi:k=2.25,v=2", "on", "ott", "qaq:bits=2.25"] {
            let mut twin = Twin::new(&lab, spec, shape(8, 4, 128, 128), 4096);
            let mut rng = Rng::new(1);
            let mut time = |cells: std::ops::Range<usize>| {
                let ints = twin.layer.plan(cells.clone());
                let ubatch = twin.layer.ubatch(&mut rng, cells.len());
                let lse = vec![1.0; cells.len() * 32];
                let floats = |x: &[f32]| lab.upload(x);
                let rows = [floats(&ubatch.q), floats(&ubatch.k), floats(&ubatch.v), floats(&lse), lab.upload(&ints)];
                let workspace = Workspace { memory: twin.workspace.pointer(), bytes: twin.workspace.bytes() };
                let call = || {
                    let call = twin.call(&rows, &ints, Learns::Everything);
                    // SAFETY: as in `Twin::store`.
                    unsafe {
                        enqueue(lab.device(), &twin.layer.layout, call, workspace, std::ptr::null_mut()).unwrap();
                    }
                };
                call();
                lab.download::<f32>(&rows[3]);
                let start = Instant::now();
                (0..CALLS).for_each(|_| call());
                lab.download::<f32>(&rows[3]);
                let microseconds = start.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS);
                let n_records = Plan::new(&ints).unwrap().records().len();
                (microseconds, n_records)
            };
            let (many, n_many) = time(0..512);
            let (one, n_one) = time(512..513);
            println!(
                "{:10} {spec:18} 512 tokens, {n_many} rows sealed: {many:8.1} us; 1 token, {n_one}: {one:6.1} us",
                lab.name()
            );
        }
    }
}

fn owned(specs: &[&str]) -> Vec<String> {
    specs.iter().map(|spec| spec.to_string()).collect()
}

#[test]
fn every_recipe() {
    walk_all(&device_recipes(&[]), &[shape(2, 2, 128, 128)], 12);
}

#[test]
fn every_width_and_form() {
    let group = ["skvq:k=8,v=8", "skvq:k=4,v=4", "skvq:k=3,v=3", "skvq:k=1.6,v=1.6", "skvq:k=2,v=2", "skvq:group=32"];
    let forms = ["skvq:smooth=0", "skvq:mean=0,rotate=0", "skvq:group=64,symmetric=0,k=4", "skvq:refit=0,clip=0.8"];
    let channel = ["kivi:k=2.25", "kivi:k=1", "kivi:k=3.5,meta=fp16", "kivi:k=4,adaptive=0", "ott:k=2.5,outliers=6"];
    let adaptive = ["qaq:bits=3,attn-keys=1", "qaq:levels=normal", "qaq:outliers=2,symmetric=0,mean=0"];
    let more = ["qaq:bits=1.5,min-bits=1,levels=normal", "qaq:adaptive=0", "qaq:attn-window=0,mean=0"];
    let specs: Vec<String> =
        [&group[..], &forms, &channel, &adaptive, &more].concat().iter().map(|s| with_page(s, 64)).collect();
    walk_all(&specs, &[shape(1, 3, 64, 96)], 16);
}

fn with_page(spec: &str, page: usize) -> String {
    format!("{spec}{}page={page},window=32", if spec.contains(':') { "," } else { ":" })
}

#[test]
fn every_page_and_head_size() {
    for page in [64, 256] {
        let specs: Vec<String> =
            ["skvq:k=1.6,v=3", "skvq:symmetric=0,group=32", "kivi:k=2.5", "qaq", "ott:k=3,outliers=3,pool=4"]
                .iter()
                .map(|spec| with_page(spec, page))
                .collect();
        walk_all(&specs, &[shape(1, 2, 96, 64), shape(1, 1, 256, 256), shape(2, 7, 64, 160)], 8);
    }
}

/// A window so small that rows of the ubatch itself are sealed, and ones that join pages.
#[test]
fn small_windows() {
    let specs =
        ["skvq:page=64,window=0,sinks=0", "kivi:page=64,window=5", "ott:page=64,window=0", "qaq:page=64,window=8"];
    walk_all(&owned(&specs), &[shape(1, 2, 64, 64)], 40);
}

/// Pages of few rows that are made anew when others join, from what the outlier pool has of them as well.
#[test]
fn pages_of_few_rows() {
    let specs = [
        "skvq:page=64,window=0,sinks=0",
        "kivi:k=2.25,page=64,window=0,sinks=0",
        "ott:k=2.5,page=64,window=0,sinks=0,outliers=6,pool=8",
        "qaq:page=64,window=0,sinks=0,outliers=1,attn-window=0",
    ];
    let page = 64;
    for lab in Lab::all() {
        for (spec, n_first) in specs.iter().flat_map(|spec| [1, 7, 15].map(|n| (spec, n))) {
            let mut twin = Twin::new(&lab, spec, shape(1, 2, 64, 64), 4 * page);
            twin.rotate(n_first == 7);
            let (mut rng, mut renewed, mut turned) = (Rng::new(n_first as u64), 0, 0);
            // As in `joined_rows`: page 0 is sealed when more is exact than the slots hold.
            let steps =
                [0..page - 1, page..2 * page - 1, 2 * page..2 * page + 4, n_first..page - 1, 3 * page..4 * page - 1];
            for (step, cells) in steps.into_iter().enumerate() {
                match step {
                    1 => twin.layer.live()[n_first..page].fill(false),
                    3 => twin.shift(&mut rng),
                    _ => {}
                }
                let cells: Vec<usize> = cells.collect();
                let ints = twin.layer.plan_cells(&cells, 10);
                let mut ubatch = twin.layer.ubatch(&mut rng, cells.len());
                spoil(&mut rng, &shape(1, 2, 64, 64), &mut ubatch, true);
                let lse = denominators(&mut rng, 2 * cells.len());
                let plan = Plan::new(&ints).unwrap();
                for record in plan.records().filter(|record| record.seal == Seal::Renew) {
                    renewed += 1;
                    turned += usize::from(plan.turned(record.cell) != 0);
                }
                let difference = twin.store(&ints, &ubatch, &lse, Learns::Everything);
                assert_eq!(difference, None, "{}: {spec}, {n_first} rows first, step {step}", lab.name());
            }
            assert!(renewed > 40 && turned > 40, "{spec}: {renewed} rows, {turned} turned, tell too little");
        }
    }
}

/// A pool that a crafted state brings: named twice, a member stays once.
#[test]
fn members_that_are_named_twice() {
    let spec = "ott:page=64,window=0,sinks=0,outliers=4,pool=8";
    for lab in Lab::all() {
        let mut twin = Twin::new(&lab, spec, shape(1, 1, 64, 64), 256);
        let mut rng = Rng::new(3);
        for cells in [0..128, 128..129] {
            if cells.start > 0 {
                for side in [Side::Key, Side::Value] {
                    let mut head = HeadMut::new(&twin.layer.layout, side, &mut twin.layer.memory[side as usize]);
                    let first = pool::cells(head.as_ref()).flatten().next();
                    [7, 10, 11].into_iter().for_each(|row| pool::set_cell(&mut head, row, first));
                }
                twin.memory = twin.layer.memory.each_ref().map(|side| lab.upload(side));
            }
            let n = cells.len();
            let (ints, ubatch) = (twin.layer.plan(cells), twin.layer.ubatch(&mut rng, n));
            assert_eq!(twin.store(&ints, &ubatch, &vec![1.0; n], Learns::Everything), None, "{}", lab.name());
            let key = Head::new(&twin.layer.layout, Side::Key, &twin.layer.memory[0]);
            let members: Vec<usize> = pool::cells(key).flatten().collect();
            let distinct: BTreeSet<usize> = members.iter().copied().collect();
            assert!(members.len() >= 4 && distinct.len() == members.len(), "{members:?}");
        }
    }
}

/// Rows that join a page whose positions have moved since it was sealed.
#[test]
fn rows_are_turned_back() {
    for lab in Lab::all() {
        for (spec, shape) in
            [("skvq:page=64,window=0", shape(1, 2, 64, 64)), ("kivi:page=64,window=8", shape(1, 3, 96, 64))]
        {
            let walked = walk(&lab, spec, shape, 331, 60, true);
            assert!(walked.turned > 20, "{spec}: {} rows tell too little", walked.turned);
        }
    }
}

/// Streams that hold different amounts of different rows store in one call what each would store alone, and are decoded in one.
#[test]
fn several_streams() {
    const N_CELLS: usize = 640;
    for lab in Lab::all() {
        // Rows of the last one fit no shared memory.
        for (spec, shape, n) in [
            ("on", shape(2, 2, 64, 64), 1),
            ("on", shape(1, 4, 128, 128), 300),
            ("qaq", shape(2, 1, 64, 96), 140),
            ("skvq:page=256", shape(1, 1, 256, 256), 200),
        ] {
            let mut rng = Rng::new(11);
            let mut twins = [310, 20, 140].map(|held| {
                let mut twin = Twin::new(&lab, spec, shape, N_CELLS);
                let (ints, ubatch) = (twin.layer.plan(0..held), twin.layer.ubatch(&mut rng, held));
                let lse = vec![1.5; held * shape.n_heads as usize];
                assert_eq!(twin.store(&ints, &ubatch, &lse, Learns::Everything), None);
                let ints = twin.layer.plan(held..held + n);
                (ints, twin.layer.ubatch(&mut rng, n), vec![2.5; n * shape.n_heads as usize], twin)
            });
            let all = |of: &dyn Fn(&Ubatch) -> &Vec<f32>| {
                lab.upload(&twins.iter().flat_map(|twin| of(&twin.1).clone()).collect::<Vec<f32>>())
            };
            let ints: Vec<i32> = twins.iter().flat_map(|twin| twin.0.clone()).collect();
            let lse: Vec<f32> = twins.iter().flat_map(|twin| twin.2.clone()).collect();
            let rows = [all(&|u| &u.q), all(&|u| &u.k), all(&|u| &u.v), lab.upload(&lse), lab.upload(&ints)];
            let memory = [0, 1].map(|side: usize| {
                lab.upload(&twins.iter().flat_map(|twin| twin.3.layer.memory[side].clone()).collect::<Vec<u8>>())
            });
            let (layout, plan_len) = (&twins[0].3.layer.layout, twins[0].0.len());
            let mut call = twins[0].3.call(&rows, &twins[0].0, Learns::Everything);
            (call.call.k_mem, call.call.v_mem) = (memory[0].pointer().cast(), memory[1].pointer().cast());
            let (k, v) = (layout.k_bytes() as u64, layout.v_bytes() as u64);
            call.call.streams = StreamDesc { k, v, plan: plan_len as u64, ..StreamDesc::default() };
            let call = Call { n_streams: 3, ..call };
            let bytes = workspace_bytes(lab.device(), layout, n as u32, 3);
            let space = lab.upload(&vec![POISON; bytes]);
            let workspace = Workspace { memory: space.pointer(), bytes };
            // SAFETY: as in `Twin::store`.
            unsafe { enqueue(lab.device(), layout, call, workspace, std::ptr::null_mut()).unwrap() };
            let got = memory.each_ref().map(|side| lab.download::<u8>(side));
            for (i, (ints, ubatch, lse, twin)) in twins.iter_mut().enumerate() {
                twin.layer.store_learning(ints, ubatch, true, Some(lse));
                for (want, got) in twin.layer.memory.iter().zip(&got) {
                    let got = &got[i * want.len()..][..want.len()];
                    let differ = want.iter().zip(got).filter(|(a, b)| a != b).count();
                    assert_eq!(differ, 0, "{}: {spec}, stream {i} of {n} rows", lab.name());
                }
            }
        }
    }
}

#[test]
fn too_little_workspace_and_short_plans_are_refused() {
    for lab in Lab::all() {
        // Rows of such pages fit no shared memory.
        let mut twin = Twin::new(&lab, "skvq:page=256", shape(1, 1, 256, 256), 512);
        let ints = twin.layer.plan(0..3);
        let rows = [(); 5].map(|()| lab.upload(&[0f32; 4096]));
        let bytes = workspace_bytes(lab.device(), &twin.layer.layout, 3, 1);
        let given = Workspace { memory: twin.workspace.pointer(), bytes };
        assert!((256 * 256 * 4..=twin.workspace.bytes()).contains(&bytes));
        let short = Workspace { bytes: given.bytes - 1, ..given };
        for (workspace, len, status) in
            [(short, ints.len(), Status::BufferTooSmall), (given, ints.len() - 1, Status::InvalidArgument)]
        {
            let call = Call { plan_len: len, ..twin.call(&rows, &ints, Learns::Nothing) };
            // SAFETY: nothing is enqueued.
            let refused = unsafe { enqueue(lab.device(), &twin.layer.layout, call, workspace, std::ptr::null_mut()) };
            assert_eq!(refused.unwrap_err().status(), status);
        }
    }
}
