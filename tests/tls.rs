//! TLS of the listeners, certificates of clients, and proxies that end TLS before the gateway.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::support::{Caller, Credentials, Scratch, TestGateway, Upstream};

/// Who signs the certificates of one test.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key.
struct Identity {
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn identity(&self, name: &str) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        Identity { certificate: params.signed_by(&key, &self.0).unwrap().der().clone(), key }
    }

    /// The authority's own certificate in a file.
    fn write(&self, scratch: &Scratch, name: &str) -> PathBuf {
        let path = scratch.path().join(name);
        std::fs::write(&path, self.0.pem()).unwrap();
        path
    }

    /// A client that trusts this authority.
    fn client(&self, identity: Option<&Identity>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(Identity { certificate, key }) => {
                let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
                builder.with_client_auth_cert(vec![certificate.clone()], key).unwrap()
            }
        };
        Arc::new(config).into()
    }
}

impl Identity {
    fn write(&self, scratch: &Scratch) -> (PathBuf, PathBuf) {
        let (certificate, key) = (scratch.path().join("certificate.pem"), scratch.path().join("key.pem"));
        std::fs::write(&certificate, pem(&self.certificate)).unwrap();
        std::fs::write(&key, self.key.serialize_pem()).unwrap();
        (certificate, key)
    }
}

/// A certificate that nobody has to trust, and its key, in files.
pub fn self_signed(scratch: &Scratch) -> (PathBuf, PathBuf) {
    Authority::new().identity("gw.example").write(scratch)
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}

/// One request over TLS; the whole answer, or what went wrong on the way.
async fn ask(gateway: &TestGateway, client: &TlsConnector, request: &str) -> std::io::Result<String> {
    let socket = TcpStream::connect(gateway.address()).await?;
    let mut socket = client.connect(ServerName::try_from("gw.example").unwrap(), socket).await?;
    socket.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    Ok(answer)
}

fn register(credentials: &Credentials) -> String {
    let body = json!({}).to_string();
    format!(
        "POST /agentx/environment/{}/register HTTP/1.1\r\nhost: gw.example:8443\r\nauthorization: Bearer {}\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        credentials.executor,
        credentials.token,
        body.len()
    )
}

#[tokio::test]
async fn operators_are_served_over_tls_to_whoever_shows_a_certificate() {
    let (scratch, authority) = (Scratch::new(), Authority::new());
    let (certificate, key) = authority.identity("gw.example").write(&scratch);
    let authorities = authority.write(&scratch, "operators.pem");
    let gateway = TestGateway::with(|config| {
        config.tls.ops_certificate = Some(certificate);
        config.tls.ops_key = Some(key);
        config.tls.ops_authorities = Some(authorities);
    })
    .await;
    let ready = async |client: TlsConnector| {
        let socket = TcpStream::connect(gateway.gateway.ops()).await?;
        let mut socket = client.connect(ServerName::try_from("gw.example").unwrap(), socket).await?;
        socket.write_all(b"GET /healthz HTTP/1.1\r\nhost: gw\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.map(|_| answer)
    };
    let answer = ready(authority.client(Some(&authority.identity("operator.example")))).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(ready(authority.client(None)).await.is_err());
    assert_eq!(gateway.stranger().send("GET", "/healthz", &[], "").await.status, 200, "the API has none");
}

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nhost: gw.example\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn the_api_is_served_over_tls_and_executors_are_sent_there() {
    let (scratch, authority) = (Scratch::new(), Authority::new());
    let (certificate, key) = authority.identity("gw.example").write(&scratch);
    let gateway = TestGateway::with(|config| {
        config.tls.certificate = Some(certificate);
        config.tls.key = Some(key);
    })
    .await;
    let credentials = gateway.executor("w", "box").await;

    let answer = ask(&gateway, &authority.client(None), &register(&credentials)).await.unwrap();

    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("\"wss://gw.example:8443/agentx/"), "{answer}");
    let mut open = TcpStream::connect(gateway.address()).await.unwrap();
    open.write_all(HEALTH.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let _ = open.read_to_end(&mut bytes).await;
    assert!(!bytes.starts_with(b"HTTP"), "nothing is said in the open");
}

#[tokio::test]
async fn executors_show_a_certificate_where_it_is_asked_for_and_callers_need_none() {
    let (scratch, authority, strange) = (Scratch::new(), Authority::new(), Authority::new());
    let (certificate, key) = authority.identity("gw.example").write(&scratch);
    let authorities = authority.write(&scratch, "executors.pem");
    let gateway = TestGateway::with(|config| {
        config.tls.certificate = Some(certificate);
        config.tls.key = Some(key);
        config.tls.executor_authorities = Some(authorities);
    })
    .await;
    let credentials = gateway.executor("w", "box").await;
    let (plain, known) = (authority.client(None), authority.client(Some(&authority.identity("box.example"))));

    let refused = ask(&gateway, &plain, &register(&credentials)).await.unwrap();
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("certificate_required"), "{refused}");
    assert!(ask(&gateway, &plain, HEALTH).await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(ask(&gateway, &known, &register(&credentials)).await.unwrap().starts_with("HTTP/1.1 200"));
    let stranger = authority.client(Some(&strange.identity("box.example")));
    assert!(ask(&gateway, &stranger, HEALTH).await.is_err(), "a certificate of nobody known is no certificate");
}

#[tokio::test]
async fn certificates_are_read_again_for_new_connections_and_bad_ones_change_nothing() {
    let (scratch, old, new) = (Scratch::new(), Authority::new(), Authority::new());
    let (certificate, key) = old.identity("gw.example").write(&scratch);
    let gateway = TestGateway::with(|config| {
        config.tls.certificate = Some(certificate.clone());
        config.tls.key = Some(key);
    })
    .await;
    assert!(ask(&gateway, &old.client(None), HEALTH).await.is_ok());

    new.identity("gw.example").write(&scratch);
    gateway.reload(|_| {}).unwrap();
    assert!(ask(&gateway, &new.client(None), HEALTH).await.is_ok());
    assert!(ask(&gateway, &old.client(None), HEALTH).await.is_err());

    std::fs::write(certificate, "not a certificate").unwrap();
    assert!(gateway.reload(|_| {}).is_err());
    assert!(ask(&gateway, &new.client(None), HEALTH).await.is_ok());
}

#[tokio::test]
async fn the_validator_is_asked_over_tls_and_believed_only_with_a_known_certificate() {
    let (scratch, authority, strange) = (Scratch::new(), Authority::new(), Authority::new());
    let upstream = Upstream::start().await;
    upstream.knows_token("good", "w");
    let address = tls_in_front_of(&upstream, authority.identity("localhost")).await;
    for (authorities, expected) in [(&authority, 200), (&strange, 503)] {
        let path = authorities.write(&scratch, "validators.pem");
        let gateway = TestGateway::with(|config| {
            upstream.configure(config);
            config.auth.upstream_url = Some(format!("https://localhost:{}", address.port()));
            config.auth.upstream_authorities = Some(path);
        })
        .await;
        let caller = Caller::new(gateway.address(), Some("good".into()));
        assert_eq!(caller.post("/api/connectors/envs/list", json!({})).await.status, expected);
    }
    assert_eq!(upstream.asked("good"), 1, "a stranger is not shown a token");
}

/// Ends TLS before the validator.
async fn tls_in_front_of(upstream: &Upstream, identity: Identity) -> SocketAddr {
    let key = PrivateKeyDer::try_from(identity.key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![identity.certificate], key)
        .unwrap();
    let (acceptor, inner) = (TlsAcceptor::from(Arc::new(config)), upstream.address());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut outer) = acceptor.accept(socket).await else { return };
                let mut inner = TcpStream::connect(inner).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut outer, &mut inner).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn a_trusted_proxy_says_how_the_executor_came_and_nobody_else_does() {
    for (trusted, expected) in [(true, "wss://gw.example/agentx/"), (false, "ws://127.0.0.1:")] {
        let gateway = TestGateway::with(|config| {
            config.edge.trusted_proxies = if trusted { vec!["127.0.0.0/8".parse().unwrap()] } else { Vec::new() };
        })
        .await;
        let credentials = gateway.executor("w", "box").await;
        let forwarded = [("x-forwarded-proto", "https"), ("x-forwarded-host", "gw.example")];
        let path = format!("/agentx/environment/{}/register", credentials.executor);
        let caller = gateway.stranger();
        let bearer = format!("Bearer {}", credentials.token);
        let mut headers = forwarded.to_vec();
        headers.push(("authorization", &bearer));
        let answer = caller.send("POST", &path, &headers, "{}").await.json();
        let url = answer["url"].as_str().unwrap();
        assert!(url.starts_with(expected), "{url}");
    }
}
