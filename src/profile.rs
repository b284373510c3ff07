//! A profile: what calibration has found of a model's keys and values, which recipes may use. It comes from a file that the
//! host reads; here are its numbers, checked.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crc32c::crc32c_append;

use crate::error::{Error, Result, Status};
use crate::rotation::Rotation;
use crate::shape::Shape;

/// Most layers of a profile: keeps a crafted one from taking memory.
const MAX_LAYERS: usize = 1 << 16;

/// The profile of a model, layer by layer. Immutable once a recipe has it; cheap to clone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    layers: Vec<Option<Arc<LayerProfile>>>,
}

/// What calibration has found of one layer. Arrays of all KV heads follow each other.
#[derive(Clone, Debug)]
pub struct LayerProfile {
    /// Whose heads: query heads do not matter.
    pub shape: Shape,
    /// How the layer's keys turn with their positions.
    pub rotation: Rotation,
    /// `[head][head_dim_k]`: the mean key, turned back to position 0.
    pub key_bias: Vec<f32>,
    /// `[head][head_dim_k][head_dim_k]`: `T`, which takes a key of a page's frame to coefficients whose errors matter alike.
    pub key_transform: Vec<f32>,
    /// `[head][head_dim_v][head_dim_k]`: `W`, and with it the value that a key of a page's frame predicts.
    pub predictor: Vec<f32>,
    /// `[head][head_dim_v]`: `b`, which is added to that.
    pub offset: Vec<f32>,
    hash: u32,
}

impl PartialEq for LayerProfile {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl LayerProfile {
    /// Checks sizes and numbers, `[key_bias, key_transform, predictor, offset]` as the fields say.
    ///
    /// # Errors
    ///
    /// [`Status::Format`] if an array has another size or a number is not finite.
    pub fn new(shape: Shape, rotation: Rotation, arrays: [Vec<f32>; 4]) -> Result<Self> {
        shape.validate()?;
        rotation.check(shape.head_dim_k as usize)?;
        let (heads, k, v) = (shape.n_kv_heads as usize, shape.head_dim_k as usize, shape.head_dim_v as usize);
        let sizes = [("key bias", k), ("key transform", k * k), ("predictor", k * v), ("offset", v)];
        let mut hash = 0;
        for ((name, size), array) in sizes.into_iter().zip(&arrays) {
            if array.len() != heads * size {
                let text = format!("the profile's {name} has {} numbers instead of {}", array.len(), heads * size);
                return Err(Error::new(Status::Format, text));
            }
            if array.iter().any(|x| !x.is_finite()) {
                return Err(Error::new(
                    Status::Format,
                    format!("the profile's {name} has numbers that are not finite"),
                ));
            }
            hash = array.iter().fold(hash, |hash, x| crc32c_append(hash, &x.to_le_bytes()));
        }
        let hash = rotation.frequencies().fold(hash, |hash, x| crc32c_append(hash, &(x as f32).to_le_bytes()));
        let [key_bias, key_transform, predictor, offset] = arrays;
        Ok(Self { shape, rotation, key_bias, key_transform, predictor, offset, hash })
    }

    /// Equal for two profiles of a layer if they hold the same numbers.
    pub fn hash(&self) -> u32 {
        self.hash
    }
}

impl Profile {
    /// Sets the profile of a layer.
    ///
    /// # Errors
    ///
    /// [`Status::InvalidArgument`] for more layers than any model has.
    pub fn set(&mut self, layer: usize, profile: LayerProfile) -> Result<()> {
        if layer >= MAX_LAYERS {
            return Err(Error::invalid(format!("layer {layer} of a profile: use at most {MAX_LAYERS} layers")));
        }
        self.layers.resize(self.layers.len().max(layer + 1), None);
        self.layers[layer] = Some(Arc::new(profile));
        Ok(())
    }

    /// The profile of a layer of this shape.
    ///
    /// # Errors
    ///
    /// [`Status::Format`] if there is none, or it is of other heads.
    pub fn layer(&self, layer: usize, shape: Shape) -> Result<&Arc<LayerProfile>> {
        let Some(found) = self.layers.get(layer).and_then(Option::as_ref) else {
            return Err(Error::new(Status::Format, format!("the profile says nothing of layer {layer}")));
        };
        let heads = |shape: Shape| (shape.n_kv_heads, shape.head_dim_k, shape.head_dim_v);
        if heads(found.shape) != heads(shape) {
            return Err(Error::new(
                Status::Format,
                format!(
                    "the profile has {:?} KV heads and head sizes in layer {layer}, the model {:?}",
                    heads(found.shape),
                    heads(shape)
                ),
            ));
        }
        Ok(found)
    }
}
