//! What device code is told of layers.

use super::profile;
use crate::codec::page::Side;
use crate::cuda::desc::*;
use crate::layout::Layout;
use crate::shape::Shape;

fn desc(spec: &str, layer: usize) -> (Layout, LayerDesc) {
    let shape = Shape { n_heads: 8, n_kv_heads: 2, head_dim_k: 128, head_dim_v: 64 };
    let layout = Layout::new(&profile::parse(spec, shape), shape, layer, 1000, 300).unwrap();
    let desc = layout.describe();
    (layout, desc)
}

#[test]
fn offsets_are_those_of_the_layout() {
    for spec in ["skvq:k=2,v=3", "on", "ott", "qaq"] {
        let (layout, desc) = desc(spec, 3);
        assert_eq!((desc.n_heads, desc.gqa_ratio, desc.n_cells, desc.n_slots, desc.n_pages), (8, 4, 1000, 300, 8));
        for (side, desc) in [(Side::Key, desc.k), (Side::Value, desc.v)] {
            assert_eq!(desc.head_bytes as usize, layout.head_bytes(side), "{spec}");
            let page = layout.page_range(side, 2);
            assert_eq!((desc.pages + 2 * u64::from(desc.page_bytes)) as usize, page.start);
            assert_eq!(desc.page_bytes as usize, page.len());
            assert_eq!(desc.headers as usize + 4, layout.header_range(side, 1).start);
            let pool = layout.pool_range(side);
            assert_eq!((desc.pool as usize, desc.pool_table as usize + 4 * layout.pool_rows()), (pool.start, pool.end));
            assert_eq!(desc.recent_end as usize, layout.slots_range(side).end);
        }
        assert_eq!(desc.pool_rows as usize, layout.pool_rows(), "{spec}");
    }
}

#[test]
fn pages_are_described_as_their_codec_has_them() {
    let (_, group) = desc("skvq:k=2,v=3", 3);
    assert_eq!((group.k.codec, group.k.width, group.k.tile_words, group.k.tile_bytes), (CODEC_GROUP, 2, 8, 4096));
    assert_eq!((group.k.steps, group.k.mids, group.k.mean, group.k.exponents), (4096, ABSENT, 4224, 4480));
    // 64 channels of 128 tokens.
    assert_eq!((group.v.width, group.v.tile_words, group.v.steps, group.v.mean), (3, 12, 3072, ABSENT));
    let (_, mixed) = desc("kivi:k=2.25,v=2", 3);
    assert_eq!((mixed.k.codec, mixed.k.budget, mixed.k.n_segments, mixed.k.tile_words), (CODEC_CHANNEL, 18, 8, 9));
    assert_eq!((mixed.k.steps, mixed.k.mids, mixed.k.order), (4608, 4736, 4864));
    let (_, adaptive) = desc("qaq:bits=2.25,outliers=1", 3);
    assert_eq!((adaptive.k.codec, adaptive.k.budget, adaptive.k.n_outliers), (CODEC_ADAPTIVE, 9, 1));
    assert_eq!(adaptive.v.outliers, adaptive.v.order + 128);
    let (layout, framed) = desc("aqua:k=2.25", 3);
    assert_eq!(
        (framed.k.codec, framed.k.budget, framed.k.fewest_segments, framed.k.n_segments),
        (CODEC_AQUA, 18, 5, 7)
    );
    // Behind numbers of 112 coefficients and the means of 16.
    assert_eq!((framed.k.steps, framed.k.tail, framed.predicts), (4608, 4608 + 3 * 112 + 16, 1));
    assert!(layout.profile().len() > 2 * 4 * (3 * 128 * 128 + 129 * 64) && desc("kivi", 3).0.profile().is_empty());
    assert_eq!(desc("aqua:predict=0", 3).1.predicts, 0);
}
