//! The C boundary: pointers become slices and handles become references at the top of each function, inside an unwind
//! guard; below it everything is safe Rust.
//!
//! What the functions here owe, and what the header asks of callers in return: a pointer is NULL or valid for the
//! size its comment gives and for the length of the call; memory that a call writes is not used by another thread
//! meanwhile (except where parts of one job are said to run concurrently); handles come from their constructors and
//! are not used after their free function. NULL, alignment and every computed length are checked here.
//!
//! A file per C object. A test counts guards and NULL tests (`src/tests/boundary.rs`).
#![allow(non_camel_case_types)]

mod attention;
mod cache;
mod calibration;
mod checksum;
mod device;
mod layout;
mod learned;
mod memory;
mod planner;
mod profile;
mod recipe;
mod shift;
mod status;
mod store;
mod version;

use std::mem::{align_of, size_of, MaybeUninit};
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::error::{Error, Result, Status};

/// Runs the body of a C function that returns a status: errors and panics become codes, their text is remembered.
fn guard(body: impl FnOnce() -> Result<()>) -> Status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(error)) => {
            status::set_last_error(error.message());
            error.status()
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            status::set_last_error(&format!("bug in kvq, please report it: {}", text.unwrap_or("unknown panic")));
            Status::Internal
        }
    }
}

/// The same for C functions that return a value: failures give `fallback`.
fn guard_or<T>(fallback: T, body: impl FnOnce() -> Result<T>) -> T {
    let mut value = fallback;
    guard(|| {
        value = body()?;
        Ok(())
    });
    value
}

/// NULL and alignment tests that every pointer passes through.
fn check<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::invalid(format!("{name} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Error::invalid(format!("{name} is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// `n` elements must fit the address space before a slice of them may exist.
fn check_len<T>(n: usize, name: &str) -> Result<()> {
    match n.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Error::invalid(format!("{name} has an impossible length: {n} elements"))),
    }
}

/// # Safety
/// `pointer` is NULL or points to a `T` that nobody changes during `'a`.
unsafe fn shared<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    check(pointer, name)?;
    // SAFETY: not NULL, aligned, and valid by the caller's promise.
    Ok(unsafe { &*pointer })
}

/// # Safety
/// `pointer` is NULL or points to a `T` that nobody else uses during `'a`.
unsafe fn exclusive<'a, T>(pointer: *mut T, name: &str) -> Result<&'a mut T> {
    check(pointer, name)?;
    // SAFETY: not NULL, aligned, valid and unshared by the caller's promise.
    Ok(unsafe { &mut *pointer })
}

/// The place for an output, which need not be initialised.
///
/// # Safety
/// `pointer` is NULL or points to room for a `T` that nobody else uses during `'a`.
unsafe fn output<'a, T>(pointer: *mut T, name: &str) -> Result<&'a mut MaybeUninit<T>> {
    // SAFETY: as promised; MaybeUninit has the layout of T and asks for no initial value.
    unsafe { exclusive(pointer.cast::<MaybeUninit<T>>(), name) }
}

/// # Safety
/// `pointer` is NULL or points to `n` elements that nobody changes during `'a`.
unsafe fn slice<'a, T>(pointer: *const T, n: usize, name: &str) -> Result<&'a [T]> {
    check(pointer, name)?;
    check_len::<T>(n, name)?;
    // SAFETY: not NULL, aligned, of a possible length, and valid by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, n) })
}

/// # Safety
/// `pointer` is NULL or points to `n` elements that nobody else uses during `'a`. They are of types for which every bit
/// pattern is a value, so C need not have written to them before.
unsafe fn slice_mut<'a, T>(pointer: *mut T, n: usize, name: &str) -> Result<&'a mut [T]> {
    check(pointer.cast_const(), name)?;
    check_len::<T>(n, name)?;
    // SAFETY: not NULL, aligned, of a possible length, valid and unshared by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, n) })
}

/// Frees what a constructor returned through `Box::into_raw`.
///
/// # Safety
/// `pointer` is NULL or came from `Box::into_raw` and is not used again.
unsafe fn release<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // SAFETY: the box is taken back once, by the caller's promise.
        drop(unsafe { Box::from_raw(pointer) });
    }
}

/// Product of lengths that fails instead of wrapping.
fn product(factors: &[usize], name: &str) -> Result<usize> {
    factors
        .iter()
        .try_fold(1usize, |product, &factor| product.checked_mul(factor))
        .ok_or_else(|| Error::invalid(format!("{name} is too large for this machine")))
}

/// Fails unless `part` is one of `n_parts`.
fn check_part(part: u32, n_parts: u32) -> Result<()> {
    if part < n_parts {
        return Ok(());
    }
    Err(Error::invalid(format!("part {part} of {n_parts}: part must be smaller than n_parts")))
}
