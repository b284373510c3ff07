//! Tests of promises that no single module can keep.

mod boundary;
mod header;
mod layer;
mod spoiled_queries;
