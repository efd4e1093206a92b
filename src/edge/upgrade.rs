//! From an HTTP request to a WebSocket with small buffers and finite sizes.

use std::future::Future;

use hyper::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION,
    UPGRADE,
};
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use super::body::{Body, full};
use super::burst::BurstRead;
use super::stall::StallLimit;
use super::transport::Transport;

/// The request is not a WebSocket handshake of RFC 6455 §4.2.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeError {
    /// It does not ask for a WebSocket.
    #[error("a WebSocket handshake was expected")]
    NotWebSocket,
    /// It asks for a version other than 13.
    #[error("only WebSocket version 13 is spoken")]
    Version,
}

/// What a WebSocket of the gateway's is made of.
pub type SocketStream = BurstRead<Transport>;

/// Sizes and buffers of one socket.
#[derive(Debug, Clone, Copy)]
pub struct SocketLimits {
    /// Read buffer, in bytes: allocated at once for each socket.
    pub read_buffer_bytes: usize,
    /// Largest message and frame accepted, in bytes.
    pub message_bytes_max: usize,
}

impl From<SocketLimits> for WebSocketConfig {
    fn from(limits: SocketLimits) -> Self {
        WebSocketConfig::default()
            .read_buffer_size(limits.read_buffer_bytes)
            .max_message_size(Some(limits.message_bytes_max))
            .max_frame_size(Some(limits.message_bytes_max))
    }
}

/// Checks that a request is a WebSocket handshake.
///
/// # Errors
/// [`UpgradeError`].
pub fn check(headers: &HeaderMap) -> Result<(), UpgradeError> {
    let lists = |name, token: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value: &HeaderValue| value.to_str().ok())
            .any(|value: &str| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    };
    if !lists(CONNECTION, "upgrade") || !lists(UPGRADE, "websocket") || !headers.contains_key(SEC_WEBSOCKET_KEY) {
        return Err(UpgradeError::NotWebSocket);
    }
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(UpgradeError::Version);
    }
    Ok(())
}

/// Accepts a checked handshake, with one of the sub-protocols that it offers or none: the answer to send, and the
/// socket once it was sent. The socket is `None` when the client left before.
pub fn accept<B>(
    mut request: Request<B>,
    protocol: Option<HeaderValue>,
    limits: SocketLimits,
) -> (Response<Body>, impl Future<Output = Option<WebSocketStream<SocketStream>>>) {
    let key = request.headers().get(SEC_WEBSOCKET_KEY).map_or(&b""[..], HeaderValue::as_bytes);
    let accept = derive_accept_key(key);
    let mut response = Response::new(full(""));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::from_str(&accept).expect("base64 is a header value"));
    if let Some(protocol) = protocol {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    let upgraded = hyper::upgrade::on(&mut request);
    let socket = async move {
        // Taking the transport out of hyper's boxes saves their buffers on every idle socket.
        let parts = upgraded.await.ok()?.downcast::<TokioIo<StallLimit<Transport>>>().ok()?;
        let stream = BurstRead::new(parts.io.into_inner().into_inner(), parts.read_buf.to_vec());
        // Given to the WebSocket, what was read already would be the size of its every later buffer.
        Some(WebSocketStream::from_raw_socket(stream, Role::Server, Some(limits.into())).await)
    };
    (response, socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_the_sizes_that_were_given() {
        let config = WebSocketConfig::from(SocketLimits { read_buffer_bytes: 512, message_bytes_max: 1000 });
        assert_eq!(config.read_buffer_size, 512);
        assert_eq!((config.max_message_size, config.max_frame_size), (Some(1000), Some(1000)));
    }
}
