//! Who a request comes from, and what a proxy that is trusted says about how it was reached.

use std::net::{IpAddr, SocketAddr};

use hyper::HeaderMap;
use hyper::header::{HOST, HeaderName};
use ipnet::IpNet;

const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// The other end of a request's connection; among the extensions of each request.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Its address: of the client, or of the proxy before it.
    pub address: SocketAddr,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// Whether it is a proxy whose word is taken.
    pub trusted: bool,
}

/// Whether proxies at this address are trusted. One that reaches an IPv6 socket over IPv4 is known by its IPv4 address.
pub(super) fn is_trusted(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address.to_canonical()))
}

/// How the client reached this gateway: whether over TLS, and under which host, which is a name or address with a port
/// at most. What anybody but a trusted proxy says about it is not heard.
pub fn reached(headers: &HeaderMap, peer: Option<&Peer>) -> (bool, Option<String>) {
    let trusted = peer.is_some_and(|peer| peer.trusted);
    // Of several proxies the one next to the client comes first.
    let said = |name: HeaderName| {
        let value = headers.get(name)?.to_str().ok()?;
        value.split(',').next().map(str::trim)
    };
    let forwarded = |name| trusted.then(|| said(name)).flatten();
    let tls = match forwarded(FORWARDED_PROTO) {
        Some(scheme) => scheme.eq_ignore_ascii_case("https") || scheme.eq_ignore_ascii_case("wss"),
        None => peer.is_some_and(|peer| peer.tls),
    };
    let host = forwarded(FORWARDED_HOST).or_else(|| said(HOST)).filter(|host| is_host(host));
    (tls, host.map(str::to_owned))
}

fn is_host(host: &str) -> bool {
    !host.is_empty()
        && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_trusted_by_its_network() {
        let networks = ["10.1.0.0/16".parse().unwrap(), "::1/128".parse().unwrap()];
        let trusted = |address: &str| is_trusted(&networks, address.parse().unwrap());
        assert!(trusted("10.1.255.1") && trusted("::1") && trusted("::ffff:10.1.2.3"));
        assert!(!trusted("10.2.0.1") && !trusted("::2") && !trusted("127.0.0.1"));
    }

    #[test]
    fn only_a_trusted_proxy_says_how_the_client_came() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("host", "inner:6060"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "gw.example")]
        {
            headers.insert(HeaderName::from_static(name), value.parse().unwrap());
        }
        let peer = |trusted, tls| Peer { address: "10.1.2.3:4".parse().unwrap(), tls, trusted };
        assert_eq!(reached(&headers, Some(&peer(true, false))), (true, Some("gw.example".into())));
        assert_eq!(reached(&headers, Some(&peer(false, false))), (false, Some("inner:6060".into())));
        assert_eq!(reached(&headers, Some(&peer(false, true))), (true, Some("inner:6060".into())));
        headers.insert("x-forwarded-host", "a/b?c".parse().unwrap());
        assert_eq!(reached(&headers, Some(&peer(true, false))), (true, None));
    }
}
