//! kvq: a compressed key/value cache for attention, as real packed bytes.
//!
//! Rows of keys and values live in *pages* of packed codes, except for the newest tokens (the residual window), the first
//! ones (sink tokens) and whatever else a recipe keeps exact. Attention is computed directly on the packed bytes.
//!
//! * [`recipe`]: what a user names, such as `skvq:k=2,v=2`.
//! * [`choose`]: which recipe fits into the memory that a user has.
//! * [`layout`]: where everything of a layer lies in memory that the host owns.
//! * [`planner`]: which row goes where, decided once per ubatch for all layers; [`plan`]: that decision as plain ints.
//! * [`attention`] and [`store`]: what a layer does with a plan; [`shift`] and [`rotation`]: what it does when positions
//!   move.
//! * [`calibrate`] and [`profile`]: what is found of a model while it reads a text, for recipes that use it.
//! * [`codec`]: how a page becomes bytes; [`simd`]: instruction sets and their tables.
//! * [`mod@reference`]: the same in 64-bit floats, short and slow; the oracle of all tests.
//! * [`cuda`]: the same attention on a GPU.
//! * `capi`: the C boundary behind `include/kvq.h`.

pub mod attention;
#[doc(hidden)]
pub mod bench_api;
pub mod cache;
pub mod calibrate;
mod capi;
pub mod choose;
pub mod codec;
pub mod cuda;
pub mod erase;
pub mod error;
mod head;
pub mod layout;
pub mod learned;
pub mod location;
pub mod parallel;
pub mod plan;
pub mod planner;
pub mod pool;
pub mod profile;
pub mod recent;
pub mod recipe;
pub mod reference;
pub mod rotation;
pub mod rows;
pub mod shape;
pub mod shift;
pub mod simd;
pub mod store;

#[cfg(test)]
mod tests;
