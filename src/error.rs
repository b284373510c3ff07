//! The one error type of the crate: a status that C callers see as a number, and a sentence for people.

use std::fmt;

/// What kind of failure an [`Error`] is. The numbers are the C status codes: 0 is success, 1 to 99 are stable and are
/// never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// An argument is NULL, zero, out of range or inconsistent with another one.
    InvalidArgument = 1,
    /// A recipe specification could not be understood, or asks for something impossible.
    Recipe = 2,
    /// The model's shape (head sizes, head counts) is not supported.
    Shape = 3,
    /// A buffer handed in is smaller than needed.
    BufferTooSmall = 4,
    /// Saved state is truncated, corrupted, or belongs to another recipe, shape or format version.
    Format = 5,
    /// The cache holds no free cell for the tokens to append.
    Full = 6,
    /// A file could not be read or written.
    Io = 7,
    /// The operation exists but not for this recipe, build or machine.
    Unsupported = 8,
    /// A bug in kvq: a panic was stopped at the C boundary.
    Internal = 9,
}

/// A failure: its [`Status`] and one clear sentence that names what to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: Status,
    message: String,
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Builds an error from its status and message.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// An [`Status::InvalidArgument`] error.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Status::InvalidArgument, message)
    }

    /// The status code.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The sentence, without the status.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
