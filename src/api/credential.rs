//! The credential that a caller shows: in a header, or, where browsers cannot set one, in the query or as the
//! sub-protocol of a WebSocket.
//!
//! Owned by the doors that stay open. It says where a credential stands; whether it is good is for `auth` to say.

use hyper::header::{HeaderValue, SEC_WEBSOCKET_PROTOCOL};
use hyper::{HeaderMap, Request};
use zeroize::Zeroizing;

use super::query_parameter;
use crate::auth::{AuthError, bearer};

/// What stands before the token in a sub-protocol.
const PROTOCOL_PREFIX: &str = "bearer.";

/// The credential of a WebSocket handshake.
pub(super) struct SocketCredential {
    /// The token.
    pub(super) token: Zeroizing<String>,
    /// The sub-protocol that carried it. The answer repeats it: a browser gives up on a server that chooses none of those
    /// it offered (RFC 6455 §4.1).
    pub(super) protocol: Option<HeaderValue>,
}

/// The token of a request: the header's, else that of `?token=`.
///
/// # Errors
/// As [`bearer`].
pub(super) fn of_request<B>(request: &Request<B>) -> Result<Zeroizing<String>, AuthError> {
    match bearer(request.headers()) {
        Err(AuthError::MissingBearer) => {
            let token = query_parameter(request.uri().query().unwrap_or_default(), "token");
            token.map(Zeroizing::new).ok_or(AuthError::MissingBearer)
        }
        token => Ok(Zeroizing::new(token?.to_owned())),
    }
}

/// The token of a WebSocket handshake: as [`of_request`], else that of the sub-protocol `bearer.<token>`.
///
/// # Errors
/// [`AuthError`]; `Invalid` when several sub-protocols are tokens.
pub(super) fn of_socket<B>(request: &Request<B>) -> Result<SocketCredential, AuthError> {
    match of_request(request) {
        Err(AuthError::MissingBearer) => of_protocol(request.headers()),
        token => Ok(SocketCredential { token: token?, protocol: None }),
    }
}

fn of_protocol(headers: &HeaderMap) -> Result<SocketCredential, AuthError> {
    let lists = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let mut offered =
        lists.flat_map(|list| list.split(',')).map(str::trim).filter(|name| name.starts_with(PROTOCOL_PREFIX));
    let name = offered.next().ok_or(AuthError::MissingBearer)?;
    if offered.next().is_some() {
        return Err(AuthError::Invalid);
    }
    let mut protocol = HeaderValue::from_str(name).map_err(|_| AuthError::Invalid)?;
    protocol.set_sensitive(true);
    Ok(SocketCredential { token: Zeroizing::new(name[PROTOCOL_PREFIX.len()..].to_owned()), protocol: Some(protocol) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shown(uri: &str, headers: &[(&str, &str)]) -> Result<(String, Option<HeaderValue>), AuthError> {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        of_socket(&request.body(()).unwrap()).map(|shown| (shown.token.to_string(), shown.protocol))
    }

    #[test]
    fn the_header_goes_before_the_query_and_the_query_before_the_sub_protocol() {
        let protocol = ("sec-websocket-protocol", "chat, bearer.p.q.r");
        let header = ("authorization", "Bearer h");
        assert_eq!(shown("/?token=q", &[header, protocol]).unwrap(), ("h".into(), None));
        assert_eq!(shown("/?token=q", &[protocol]).unwrap(), ("q".into(), None));
        assert_eq!(shown("/", &[protocol]).unwrap(), ("p.q.r".into(), Some("bearer.p.q.r".parse().unwrap())));
        let shown = shown("/", &[("sec-websocket-protocol", "chat"), ("sec-websocket-protocol", "bearer.x")]);
        assert!(format!("{:?}", shown.unwrap().1) == "Some(Sensitive)");
    }

    #[test]
    fn a_credential_that_is_missing_or_not_the_only_one_is_refused() {
        for headers in [&[][..], &[("sec-websocket-protocol", "chat, Bearer.x")]] {
            assert!(matches!(shown("/", headers), Err(AuthError::MissingBearer)), "{headers:?}");
        }
        assert!(matches!(shown("/", &[("authorization", "Basic x")]), Err(AuthError::MissingBearer)));
        let two = [("sec-websocket-protocol", "bearer.a, bearer.b")];
        assert!(matches!(shown("/", &two), Err(AuthError::Invalid)));
    }
}
