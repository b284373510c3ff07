//! A K-shift of a long context: CPU time of one layer, beside the attention of a token before and after.

use kvq::attention::{attend, AttendArgs, Mask};
use kvq::codec::page::Side;
use kvq::layout::Layout;
use kvq::plan::{plan_len, Plan};
use kvq::planner::{Planner, Row};
use kvq::recipe::Recipe;
use kvq::rotation::Rotation;
use kvq::rows::Rows;
use kvq::shape::Shape;
use kvq::shift::shift_head;
use kvq::store::{store_head, StoreRows};

use super::{cpu_seconds, noise};

const SHAPE: Shape = Shape { n_heads: 32, n_kv_heads: 8, head_dim_k: 128, head_dim_v: 128 };
const UBATCH: usize = 512;

struct Filled {
    layout: Layout,
    planner: Planner,
    rotation: Rotation,
    k: Vec<u8>,
    v: Vec<u8>,
    n_held: usize,
}

impl Filled {
    fn new(spec: &str, n_cells: usize) -> Self {
        let recipe = Recipe::parse(spec).expect("a recipe");
        let planner = Planner::new(recipe.planner_config(n_cells, 1, 1)).expect("a planner");
        let layout = Layout::new(&recipe, SHAPE, 0, n_cells, planner.n_slots()).expect("a layout");
        let frequencies: Vec<f64> = (0..64).map(|pair| 5e5f64.powf(-f64::from(pair) / 64.0)).collect();
        let rotation = Rotation::new(&frequencies, false).expect("a rotation");
        let (k, v) = (vec![0; layout.k_bytes()], vec![0; layout.v_bytes()]);
        let mut filled = Self { layout, planner, rotation, k, v, n_held: 0 };
        let rows = noise(UBATCH * SHAPE.n_kv_heads as usize * 128, 3);
        // One cell stays free for the token that attends.
        while filled.n_held < n_cells - 1 {
            filled.store(&rows, UBATCH.min(n_cells - 1 - filled.n_held));
        }
        filled
    }

    fn plan(&mut self, n: usize) -> Vec<i32> {
        let config = *self.planner.config();
        let first = self.n_held;
        let rows: Vec<Row> = (first..first + n).map(|i| Row { cell: i as u32, pos: i as i32, seq: 0 }).collect();
        let mut plan = vec![0; plan_len(n, self.planner.n_slots(), config.n_cells, config.page)];
        self.planner.plan(0, &rows, &|cell| cell < first, &mut plan).expect("a plan");
        plan
    }

    fn store(&mut self, rows: &[f32], n: usize) {
        let plan = self.plan(n);
        let rows = Rows { data: rows, stride_token: SHAPE.n_kv_heads as usize * 128, stride_head: 128 };
        let rows = StoreRows { positions: None, k: rows, v: rows, q: None, attended: None, rotation: None };
        let keys = self.k.chunks_exact_mut(self.layout.head_bytes(Side::Key));
        let values = self.v.chunks_exact_mut(self.layout.head_bytes(Side::Value));
        for (head, (key, value)) in keys.zip(values).enumerate() {
            store_head(&self.layout, head, [key, value], &rows, &Plan::new(&plan).expect("a plan")).expect("stored");
        }
        self.n_held += n;
    }

    /// Milliseconds of the attention of one token.
    fn attend(&mut self) -> f64 {
        let planner = self.planner.clone();
        let plan = self.plan(1);
        self.planner = planner;
        let (q, row) = (noise(32 * 128, 5), noise(8 * 128, 6));
        let rows = |data| Rows { data, stride_token: 32 * 128, stride_head: 128 };
        let args = AttendArgs {
            q: rows(&q),
            current: Some((rows(&row), rows(&row))),
            k_mem: &self.k,
            v_mem: &self.v,
            plan: Plan::new(&plan).expect("a plan"),
            rotation: Some(&self.rotation),
            mask: Mask::None,
            mask_stride_token: 0,
            n_kv: self.n_held + 1,
            sink_logits: None,
            scale: 0.09,
            softcap: 0.0,
            max_bias: 0.0,
            n_tokens: 1,
            n_splits: 1,
            with_lse: false,
        };
        let run = || attend(&self.layout, &args, 0, 1, &mut |_, row| assert!(row[0].is_finite())).expect("attended");
        fastest(5, run)
    }

    /// Milliseconds of a shift, the planner's part and the layer's.
    fn shift(&mut self, moved: &[i32]) -> [f64; 2] {
        let n_held = self.n_held;
        let start = cpu_seconds();
        let shift = self.planner.shift(0, moved, &|cell| cell < n_held).expect("a shift");
        let planned = cpu_seconds();
        for region in self.k.chunks_exact_mut(self.layout.head_bytes(Side::Key)) {
            shift_head(&self.layout, region, None, &shift, &self.rotation).expect("shifted");
        }
        [(planned - start) * 1e3, (cpu_seconds() - planned) * 1e3]
    }
}

fn fastest(n: usize, run: impl Fn()) -> f64 {
    let time = || {
        let start = cpu_seconds();
        run();
        (cpu_seconds() - start) * 1e3
    };
    (0..n).map(|_| time()).fold(f64::INFINITY, f64::min)
}

pub fn run(spec: &str, n_cells: usize) {
    let mut filled = Filled::new(spec, n_cells);
    let before = filled.attend();
    let all = filled.shift(&vec![-8; n_cells]);
    let together = filled.attend();
    // As after a long time of rolling: each page has moved by a distance of its own.
    let own: Vec<i32> = (0..n_cells).map(|cell| (cell / 128) as i32 * -128).collect();
    filled.shift(&own);
    let apart = filled.attend();
    // Self-extend divides positions: no page can say that.
    let divided: Vec<i32> = (0..n_cells as i32).map(|cell| cell / 4 - cell).collect();
    let again = filled.shift(&divided);
    println!(
        "K-shift of {n_cells} cells, {spec}, 8 KV heads of 128: planner {:.2} ms, a layer {:.2} ms; encoding all of a layer \
         again {:.0} ms; attention of a token {before:.2} ms, all pages moved alike {together:.2}, each by its own distance \
         {apart:.2}",
        all[0], all[1], again[1]
    );
}
