//! The text that belongs to the last failure of a thread.

use std::cell::RefCell;
use std::ffi::{c_char, CStr, CString};

use super::guard_or;

thread_local! {
    static LAST_ERROR: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// Remembers the text of a failure for `kvq_last_error`.
pub(super) fn set_last_error(message: &str) {
    // A text with a NUL inside would be cut there by every C reader.
    let text = CString::new(message.replace('\0', " ")).ok();
    LAST_ERROR.with(|last| *last.borrow_mut() = text);
}

/// One sentence about the last failure of a kvq function in this thread: what is wrong and what to change.
///
/// Never NULL; "" if nothing failed yet. The text is UTF-8, belongs to kvq and stays as it is until the next failure
/// in the same thread. Successful calls do not clear it: look at the returned status first.
#[no_mangle]
pub extern "C" fn kvq_last_error() -> *const c_char {
    let empty = c"".as_ptr();
    guard_or(empty, || Ok(LAST_ERROR.with(|last| last.borrow().as_deref().map_or(empty, CStr::as_ptr))))
}
