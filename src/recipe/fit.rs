//! The recipe that a small cache gets: fewer rows that are not packed, so that it stays smaller than FP16.
//!
//! The rule knows sizes only, never data. It changes nothing of a recipe's defaults from 512 cells on (`qaq`, whose full
//! pages wait for as many tokens as the window has: from 1024), and nothing a user may ask for from 32768.
#![forbid(unsafe_code)]

use super::{Recipe, MIN_PAGE};
use crate::planner::{sequences_per_stream, UNSEALED_SHARE};
use crate::recipe::PoolParams;

/// A window is not cut below this. Page and window together then take half of 256 cells at most.
const MIN_WINDOW: usize = 32;
/// The sink tokens of all sequences take at most one cell in so many.
const SINK_SHARE: usize = 32;
/// Rows of the outlier pool: at most one for so many cells.
const POOL_SHARE: usize = 8;
/// Query tokens kept for the widths of codes: at most one for so many cells, since each is a query of every head.
const QUERY_SHARE: usize = 32;

impl Recipe {
    /// The recipe as a cache of `n_cells` cells in each of `n_streams` streams carries it out; `n_seq_max` sequences share
    /// a single stream.
    ///
    /// A page that is filling up, the tokens for which a full one waits, and the window are exact, and take at most a
    /// quarter of the cells: the page shrinks first, to no fewer than 64 cells, then the window, to no fewer than 32
    /// tokens. Sink tokens, outlier tokens and recent queries have bounds of their own. Fitting twice changes nothing more.
    pub fn fit(&self, n_cells: usize, n_streams: usize, n_seq_max: usize) -> Recipe {
        let mut fitted = self.clone();
        let room = n_cells / UNSEALED_SHARE;
        // Without a lag the rows of a page that is filling up are in the window, and only the longer of both counts.
        let beside_page = self.seal_lag.min(room / 2);
        while fitted.page > MIN_PAGE && fitted.page + beside_page > room {
            fitted.page /= 2;
        }
        let longest = if self.seal_lag > 0 { room.saturating_sub(fitted.page) } else { room };
        fitted.window = self.window.min(longest.max(MIN_WINDOW));
        fitted.seal_lag = self.seal_lag.min(fitted.window);
        fitted.sink_tokens =
            self.sink_tokens.min(n_cells / SINK_SHARE / sequences_per_stream(n_streams, n_seq_max).max(1));
        fitted.attn_window = self.attn_window.min((n_cells / QUERY_SHARE).max(1)).min(fitted.window);
        fitted.pool = self.pool.map(|pool| {
            let rows = n_cells / POOL_SHARE;
            let outliers = pool.outliers.min(rows);
            PoolParams { outliers, extra: pool.extra.min(rows - outliers), ..pool }
        });
        fitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::planner::n_slots;
    use crate::shape::Shape;

    /// Every method at its most expensive, and as it is.
    const SPECS: [&str; 10] = [
        "skvq",
        "skvq:k=8,v=8,group=32,sinks=64,window=8192,page=256",
        "skvq:paper,page=256,window=1000",
        "kivi",
        "kivi:k=4,v=8,meta=fp16,group=32,sinks=64,window=8192,page=256",
        "ott",
        "ott:k=4,v=8,meta=fp16,group=32,sinks=64,window=8192,page=256,outliers=16,pool=112,skip-layers=0",
        "qaq",
        "qaq:bits=4,outliers=2,attn-window=64,sinks=64,window=8192,page=256",
        "qaq:paper",
    ];

    fn bytes(recipe: &Recipe, shape: Shape, n_cells: usize, n_seq_max: usize) -> usize {
        let n_slots = n_slots(&recipe.planner_config(n_cells, 1, n_seq_max));
        let layout = Layout::new(recipe, shape, 5, n_cells, n_slots).unwrap();
        layout.k_bytes() + layout.v_bytes()
    }

    #[test]
    fn every_cache_of_256_cells_or_more_is_smaller_than_f16() {
        // The last page may hold but one cell.
        let sizes = (4..22).flat_map(|pages| [64 * pages, 64 * pages + 1, 64 * pages + 4]).chain([2048, 4097, 32768]);
        let shapes = [(8, 8, 64, 64), (4, 1, 256, 256), (8, 1, 128, 128), (14, 2, 64, 64), (4, 2, 128, 192)];
        for spec in SPECS {
            let recipe = Recipe::parse(spec).unwrap();
            for (n_heads, n_kv_heads, head_dim_k, head_dim_v) in shapes {
                let shape = Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v };
                for n_cells in sizes.clone() {
                    for n_seq_max in [1, 4, 64] {
                        let fitted = recipe.fit(n_cells, 1, n_seq_max);
                        let have = bytes(&fitted, shape, n_cells, n_seq_max);
                        let f16 = n_cells * (n_kv_heads * (head_dim_k + head_dim_v)) as usize * 2;
                        assert!(
                            have < f16,
                            "{fitted}, {n_cells} cells, {n_seq_max} sequences: {have} bytes, f16 {f16}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_fitted_recipe_is_a_recipe_and_fits() {
        for spec in SPECS {
            let recipe = Recipe::parse(spec).unwrap();
            for n_cells in [1, 31, 64, 100, 256, 300, 512, 777, 1024, 4096] {
                for (n_streams, n_seq_max) in [(1, 1), (1, 4), (4, 4), (1, 64)] {
                    let fitted = recipe.fit(n_cells, n_streams, n_seq_max);
                    assert_eq!(fitted.fit(n_cells, n_streams, n_seq_max), fitted, "{spec}, {n_cells} cells");
                    assert_eq!(Recipe::parse(&fitted.spec()).unwrap(), fitted, "{spec}, {n_cells} cells");
                }
            }
        }
    }

    #[test]
    fn large_caches_get_what_was_asked_for() {
        for (spec, n_cells) in [("skvq", 512), ("kivi", 512), ("ott", 512), ("qaq", 1024), ("qaq:paper", 1024)] {
            let recipe = Recipe::parse(spec).unwrap();
            assert_eq!(recipe.fit(n_cells, 1, 4), recipe, "{spec}");
        }
        for spec in ["skvq:window=256,page=256", "ott:outliers=16,pool=112,sinks=64", "qaq:attn-window=64,window=256"] {
            let recipe = Recipe::parse(spec).unwrap();
            assert_eq!(recipe.fit(2048, 1, 1), recipe, "{spec}");
        }
        let longest = Recipe::parse("skvq:window=8192,page=256,sinks=64").unwrap();
        assert_eq!(longest.fit(32768, 1, 4), longest);
        let fitted = longest.fit(512, 1, 4);
        assert_eq!((fitted.page, fitted.window, fitted.sink_tokens), (128, 128, 4));
        let fitted = Recipe::parse("qaq").unwrap().fit(256, 1, 1);
        assert_eq!((fitted.page, fitted.window, fitted.seal_lag, fitted.attn_window), (64, 32, 32, 5));
    }
}
