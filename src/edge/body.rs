//! Bodies: reading a request's within its bounds, and making an answer's.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;

/// The body of every answer.
pub type Body = UnsyncBoxBody<Bytes, BrokenOff>;

/// An answer that ends in the middle. Its connection is cut, so that its client sees that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer was broken off")]
pub struct BrokenOff;

/// A body that is all there.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Why a request's body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is larger than the route allows.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// It did not arrive in time.
    #[error("the body did not arrive within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The connection failed.
    #[error("the body did not arrive whole")]
    Broken,
}

/// Reads at most `bytes_max` bytes and keeps none: a client that reads no answer before it has sent all would miss a
/// refusal otherwise, as its connection breaks.
pub async fn discard(body: Incoming, bytes_max: usize, wait: Duration) {
    let mut body = Limited::new(body, bytes_max);
    let discarding = async { while let Some(Ok(_)) = body.frame().await {} };
    // Whoever takes longer has had its chance.
    let _ = tokio::time::timeout(wait, discarding).await;
}

/// Reads a whole body of at most `bytes_max` bytes.
///
/// # Errors
/// [`BodyError`].
pub async fn read(body: Incoming, bytes_max: usize, wait: Duration) -> Result<Bytes, BodyError> {
    let announced = hyper::body::Body::size_hint(&body).lower();
    if usize::try_from(announced).is_ok_and(|length| length > bytes_max) {
        return Err(BodyError::TooLarge(bytes_max));
    }
    match tokio::time::timeout(wait, Limited::new(body, bytes_max).collect()).await {
        Err(_) => Err(BodyError::Timeout(wait)),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(BodyError::TooLarge(bytes_max)),
        Ok(Err(_)) => Err(BodyError::Broken),
    }
}
