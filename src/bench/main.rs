//! Single kernels against their floors, one thread: `cargo bench [-- FILTER...] [--csv]`.
//!
//! Each line is a kernel, an instruction set, a shape and a working set: `L2` stays in the second-level cache, `memory`
//! is larger than any cache. Times are CPU time per token (per row of the cache), smallest, median and largest of the
//! samples. The floor is the larger of bytes / read bandwidth (`memory` only) and multiply-adds / the peak of int8 dot
//! products, both measured here; exact rows and softmax work in floats, so that floor is not theirs and is left out.
//! Before it is timed, every kernel is compared with the scalar implementation.
//!
//! For attention as a whole, beside stock llama.cpp, see `patches/bench.sh`.

mod shift;

use std::hint::black_box;

use kvq::bench_api::{ExactBench, PageBench};
use kvq::codec::page::{Side, HEADER_BYTES};
use kvq::recipe::Recipe;
use kvq::simd::isa::{Isa, IsaToken};

const PAGE: usize = 128;
const SAMPLES: usize = 15;
/// A sample repeats its work until it has taken this long.
const SAMPLE_SECONDS: f64 = 2e-3;
/// Pages that are really different; larger working sets repeat them.
const DISTINCT_PAGES: usize = 16;
const MEMORY_BYTES: usize = 128 << 20;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let bench = Bench {
        csv: args.iter().any(|arg| arg == "--csv"),
        filters: args.into_iter().filter(|arg| !arg.starts_with("--")).collect(),
        bandwidth: read_bandwidth(),
        peak: int8_peak(),
    };
    bench.print_head();
    for isa in Isa::ALL {
        let Some(token) = IsaToken::new(isa) else { continue };
        for width in ["1.6", "2", "3", "4", "8"] {
            bench.codec(token, &format!("skvq:k={width},v={width}"), &format!("group {width}"), 128);
        }
        bench.codec(token, "skvq:k=2,v=2,group=64", "group 2/64", 128);
        for dim in [64, 96, 256] {
            bench.codec(token, "skvq:k=2,v=2", "group 2", dim);
        }
        for width in ["2.25", "3", "4"] {
            bench.side(token, &format!("kivi:k={width}"), &format!("channel {width}"), 128, Side::Key);
        }
        for (keys, name) in
            [("2.25", "2.25"), ("3", "3"), ("2.25,levels=normal", "2.25 n"), ("2.25,outliers=1", "2.25 o")]
        {
            bench.codec(token, &format!("qaq:bits={keys}"), &format!("adaptive {name}"), 128);
        }
        bench.exact(token, 128);
    }
    if bench.filters.is_empty() || bench.filters.iter().any(|filter| filter == "shift") {
        ["skvq", "kivi:k=2.25"].into_iter().for_each(|spec| shift::run(spec, 131_072));
    }
}

struct Bench {
    csv: bool,
    filters: Vec<String>,
    /// Bytes a second.
    bandwidth: f64,
    /// int8 multiply-adds a second; 0 if not known.
    peak: f64,
}

/// What a line is about.
struct Case<'a> {
    kernel: &'a str,
    token: IsaToken,
    codec: &'a str,
    dim: usize,
    /// Query rows that share a pass.
    rows: usize,
    set: &'a str,
    /// Bytes of the cache that a token's pass reads (or, sealing, writes).
    bytes: f64,
    /// Codes (or floats) times query rows that a token's pass handles.
    codes: f64,
    /// There is a floor: the codes are int8 multiply-adds.
    int8: bool,
}

impl Bench {
    /// Seals, scores and accumulates pages of both sides of a recipe.
    fn codec(&self, token: IsaToken, spec: &str, codec: &str, dim: usize) {
        self.side(token, spec, codec, dim, Side::Key);
        self.side(token, spec, codec, dim, Side::Value);
    }

    fn side(&self, token: IsaToken, spec: &str, codec: &str, dim: usize, side: Side) {
        let recipe = Recipe::parse(spec).expect("a recipe of this file");
        let (kernel, seal) = if side == Side::Key { ("scores", "seal keys") } else { ("accumulate", "seal values") };
        if ![kernel, seal].iter().any(|kernel| self.wants(&format!("{kernel} {} {codec} {dim}", token.isa().name()))) {
            return;
        }
        let mut pages = Pages::new(&recipe, side, dim, token);
        let bytes = pages.bench.page_bytes() as f64 / PAGE as f64;
        let case = |kernel, rows, set, int8| {
            let codes = (dim * rows) as f64;
            Case { kernel, token, codec, dim, rows, set, bytes, codes, int8 }
        };
        self.run(&case(seal, 1, "L2", false), PAGE, || pages.seal_one());
        for rows in [4, 32] {
            pages.check(&recipe, side, rows);
            for set in ["L2", "memory"] {
                let n = pages.repeat(if set == "L2" { DISTINCT_PAGES } else { MEMORY_BYTES / (bytes as usize * PAGE) });
                self.run(&case(kernel, rows, set, true), PAGE * n, || pages.pass(side));
            }
        }
    }

    /// Exact rows and softmax.
    fn exact(&self, token: IsaToken, dim: usize) {
        let scalar = IsaToken::new(Isa::Scalar).expect("every CPU has it");
        for rows in [4, 32] {
            let (q, k, p) = (noise(rows * dim, 1), noise(PAGE * dim, 2), weights(rows, 3));
            let case = |kernel, floats| {
                let codes = (floats * rows) as f64;
                let bytes = 4.0 * if floats == 1 { codes } else { floats as f64 };
                Case { kernel, token, codec: "-", dim, rows, set: "L2", bytes, codes, int8: false }
            };
            let (mut this, mut reference) = (ExactBench::new(token, rows, dim), ExactBench::new(scalar, rows, dim));
            let (mut got, mut want) = (vec![0.0; rows * PAGE], vec![0.0; rows * PAGE]);
            this.scores(&q, &k, dim, &mut got);
            reference.scores(&q, &k, dim, &mut want);
            assert_close(&got, &want, 1e-10, "exact scores");
            this.softmax(&mut got, PAGE);
            reference.softmax(&mut want, PAGE);
            assert_close(&got, &want, 1e-10, "softmax");
            let (mut sum, mut want_sum) = (vec![0.0; rows * dim], vec![0.0; rows * dim]);
            this.accumulate(&p, &k, dim, &mut sum);
            reference.accumulate(&p, &k, dim, &mut want_sum);
            assert_close(&sum, &want_sum, 1e-10, "exact accumulate");

            self.run(&case("exact scores", dim), PAGE, || this.scores(&q, &k, dim, black_box(&mut got)));
            self.run(&case("exact accumulate", dim), PAGE, || this.accumulate(&p, &k, dim, black_box(&mut sum)));
            let scores = noise(rows * PAGE, 4);
            self.run(&case("softmax", 1), PAGE, || {
                got.copy_from_slice(&scores);
                this.softmax(black_box(&mut got), PAGE);
            });
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|f| name.contains(f.as_str()))
    }

    /// Times `work`, which handles `tokens` tokens a call, and prints a line.
    fn run(&self, case: &Case, tokens: usize, mut work: impl FnMut()) {
        let name = format!("{} {} {} {}", case.kernel, case.token.isa().name(), case.codec, case.dim);
        if !self.wants(&name) {
            return;
        }
        let mut seconds = |n: usize| {
            let start = cpu_seconds();
            (0..n).for_each(|_| work());
            cpu_seconds() - start
        };
        let n = (SAMPLE_SECONDS / seconds(1).max(1e-9)).ceil().clamp(1.0, 1e6) as usize;
        let mut ns: Vec<f64> = (0..SAMPLES).map(|_| seconds(n) * 1e9 / (n * tokens) as f64).collect();
        ns.sort_by(f64::total_cmp);
        let (min, median, max) = (ns[0], ns[SAMPLES / 2], ns[SAMPLES - 1]);
        let from_memory = if case.set == "memory" { case.bytes / self.bandwidth } else { 0.0 };
        let from_int8 = if self.peak > 0.0 { case.codes / self.peak } else { 0.0 };
        let floor = case.int8.then_some(from_memory.max(from_int8) * 1e9);
        let Case { kernel, codec, dim, rows, set, bytes, codes, .. } = case;
        let isa = case.token.isa().name();
        let (rate, gb) = (codes / median, bytes / median);
        if self.csv {
            let floor = floor.map_or(String::new(), |ns| format!("{ns:.4}"));
            println!(
                "{kernel},{isa},{codec},{dim},{rows},{set},{min:.4},{median:.4},{max:.4},{gb:.3},{rate:.2},{floor}"
            );
            return;
        }
        let floor = floor.map_or(String::new(), |floor| format!(" {floor:>9.3} {:>5.0}%", 100.0 * floor / median));
        println!(
            "{kernel:<16} {isa:<7} {codec:<15} {dim:>4} {rows:>4} {set:<7} {min:>9.3} {median:>9.3} {max:>9.3} \
             {gb:>8.2} {rate:>9.1}{floor}"
        );
    }

    fn print_head(&self) {
        if self.csv {
            println!("kernel,isa,codec,head_dim,rows,set,ns_min,ns_median,ns_max,GB/s,codes_per_ns,ns_floor");
            return;
        }
        println!(
            "{}, commit {}: reads {:.1} GB/s, int8 {:.0} G multiply-adds/s, one thread",
            machine(),
            commit(),
            self.bandwidth / 1e9,
            self.peak / 1e9
        );
        println!(
            "{:<16} {:<7} {:<15} {:>4} {:>4} {:<7} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9} {:>6}",
            "kernel",
            "isa",
            "codec",
            "dim",
            "rows",
            "set",
            "ns min",
            "median",
            "max",
            "GB/s",
            "codes/ns",
            "floor ns",
            "share"
        );
    }
}

/// Sealed pages of one side, and what its kernels read and write.
struct Pages {
    bench: PageBench,
    dim: usize,
    rows: Vec<f32>,
    scratch: Vec<f32>,
    header: Vec<u8>,
    bytes: Vec<u8>,
    out: Vec<f32>,
}

impl Pages {
    fn new(recipe: &Recipe, side: Side, dim: usize, token: IsaToken) -> Self {
        let bench = PageBench::new(recipe, side, dim, token).expect("a recipe of this file");
        let rows = noise(PAGE * dim, 5);
        let mut pages = Self { scratch: rows.clone(), rows, bench, dim, header: vec![], bytes: vec![], out: vec![] };
        pages.repeat(DISTINCT_PAGES);
        for page in 0..DISTINCT_PAGES {
            let size = pages.bench.page_bytes();
            let mut rows = noise(PAGE * dim, 10 + page as u64);
            let header = &mut pages.header[page * HEADER_BYTES..][..HEADER_BYTES];
            pages.bench.seal(header, &mut pages.bytes[page * size..][..size], &mut rows);
        }
        pages
    }

    /// Makes `n` pages out of the distinct ones.
    fn repeat(&mut self, n: usize) -> usize {
        for (values, unit) in [(&mut self.header, HEADER_BYTES), (&mut self.bytes, self.bench.page_bytes())] {
            values.resize(DISTINCT_PAGES * unit, 0);
            while values.len() < n * unit {
                values.extend_from_within(..(DISTINCT_PAGES * unit).min(n * unit - values.len()));
            }
        }
        n
    }

    fn seal_one(&mut self) {
        // Sealing rotates its rows in place, so they are renewed; a copy takes little beside it.
        self.scratch.copy_from_slice(&self.rows);
        let size = self.bench.page_bytes();
        self.bench.seal(&mut self.header[..HEADER_BYTES], &mut self.bytes[..size], &mut self.scratch);
    }

    fn pass(&mut self, side: Side) {
        let size = self.bench.page_bytes();
        for (header, bytes) in self.header.chunks_exact(HEADER_BYTES).zip(self.bytes.chunks_exact(size)) {
            match side {
                Side::Key => self.bench.scores(header, bytes, &mut self.out),
                Side::Value => self.bench.accumulate(header, bytes, &mut self.out),
            }
        }
        black_box(&mut self.out);
    }

    /// Prepares `rows` query rows and compares one page with the scalar implementation.
    fn check(&mut self, recipe: &Recipe, side: Side, rows: usize) {
        let scalar = IsaToken::new(Isa::Scalar).expect("every CPU has it");
        let mut reference = PageBench::new(recipe, side, self.dim, scalar).expect("a recipe of this file");
        let size = self.bench.page_bytes();
        let (header, bytes) = (&self.header[..HEADER_BYTES], &self.bytes[..size]);
        let n = rows * if side == Side::Key { PAGE } else { self.dim };
        (self.out, self.scratch) = (vec![0.0; n], self.rows.clone());
        let mut want = vec![0.0; n];
        if side == Side::Key {
            let q = noise(rows * self.dim, 6);
            self.bench.set_query(&q);
            reference.set_query(&q);
            self.bench.scores(header, bytes, &mut self.out);
            reference.scores(header, bytes, &mut want);
        } else {
            let p = weights(rows, 7);
            self.bench.set_weights(&p);
            reference.set_weights(&p);
            self.bench.accumulate(header, bytes, &mut self.out);
            reference.accumulate(header, bytes, &mut want);
        }
        assert_close(&self.out, &want, self.bench.info().nmse, &recipe.spec());
    }
}

fn assert_close(got: &[f32], want: &[f32], bound: f64, what: &str) {
    let error: f64 = got.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let nmse = error / want.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
    assert!(nmse <= bound, "{what}: NMSE {nmse:.2e}, bound {bound:.0e}");
}

/// Gaussian-like values.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.732).collect()
}

/// Softmax-like weights, `[rows][PAGE]`.
fn weights(rows: usize, seed: u64) -> Vec<f32> {
    noise(rows * PAGE, seed).into_iter().map(|x| (x - 3.0).exp()).collect()
}

/// CPU time of this thread where the system tells it: other programs do not count.
fn cpu_seconds() -> f64 {
    #[cfg(target_os = "linux")]
    {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: t is a timespec to write to.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
        t.tv_sec as f64 + 1e-9 * t.tv_nsec as f64
    }
    #[cfg(not(target_os = "linux"))]
    {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed().as_secs_f64()
    }
}

/// The most of `amount` a second that eight calls of `work` reach.
fn best(amount: f64, mut work: impl FnMut()) -> f64 {
    (0..8).fold(0.0, |best, _| {
        let start = cpu_seconds();
        work();
        f64::max(best, amount / (cpu_seconds() - start))
    })
}

fn read_bandwidth() -> f64 {
    let words = vec![1u64; MEMORY_BYTES / 8];
    best(MEMORY_BYTES as f64, || {
        black_box(black_box(&words).iter().fold(0u64, |a, b| a.wrapping_add(*b)));
    })
}

#[cfg(target_arch = "x86_64")]
fn int8_peak() -> f64 {
    use std::arch::{asm, x86_64::*};

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn multiply_add(rounds: usize) {
        let x = _mm512_set1_epi8(3);
        let mut s = [x; 8];
        let [a, b, c, d, e, f, g, h] = &mut s;
        for _ in 0..rounds {
            // SAFETY: touches only the registers named. As text, because a compiler would multiply once and add often.
            unsafe {
                asm!(
                    "vpdpbusd {a}, {x}, {x}", "vpdpbusd {b}, {x}, {x}",
                    "vpdpbusd {c}, {x}, {x}", "vpdpbusd {d}, {x}, {x}",
                    "vpdpbusd {e}, {x}, {x}", "vpdpbusd {f}, {x}, {x}",
                    "vpdpbusd {g}, {x}, {x}", "vpdpbusd {h}, {x}, {x}",
                    x = in(zmm_reg) x,
                    a = inout(zmm_reg) *a, b = inout(zmm_reg) *b, c = inout(zmm_reg) *c, d = inout(zmm_reg) *d,
                    e = inout(zmm_reg) *e, f = inout(zmm_reg) *f, g = inout(zmm_reg) *g, h = inout(zmm_reg) *h,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
    }

    if IsaToken::new(Isa::Avx512).is_none() {
        return 0.0;
    }
    const ROUNDS: usize = 1 << 18;
    // SAFETY: the token says that this CPU has AVX-512 with VNNI.
    best((ROUNDS * 8 * 64) as f64, || unsafe { multiply_add(ROUNDS) })
}

#[cfg(not(target_arch = "x86_64"))]
fn int8_peak() -> f64 {
    0.0
}

fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("unknown CPU".into(), |(_, name)| name.into())
}

fn commit() -> String {
    let output = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
    output
        .ok()
        .filter(|o| o.status.success())
        .map_or("unknown".into(), |o| String::from_utf8_lossy(&o.stdout).trim().into())
}
