//! Tests of promises that no single module can keep.

mod boundary;
mod crafted_pool;
mod desc;
mod device;
mod device_dequantize;
mod device_question;
mod device_store;
mod device_times;
mod device_twin;
mod header;
mod hostile_memory;
mod joined_rows;
mod layer;
pub(crate) mod profile;
pub(crate) mod random;
mod recoded_values;
mod spoiled_queries;
mod vectors;
mod weights;
