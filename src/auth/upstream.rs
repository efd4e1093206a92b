//! Client of the service that validates proxy tokens and executor credentials.
//!
//! Shared by the authentications that ask it; never caches, never follows a redirect, never shows a credential.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use exec_gateway_protocol::ids::{UserId, WorkspaceId};
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::TokenCounters;
use crate::config::Secret;
use crate::trace;

/// Answers are a few hundred bytes; what is longer is not one.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Below the 5 s after which common HTTP servers close an idle connection: reusing it then would meet their close.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Why the service gave no verdict. No variant tells its address, a credential or the secret.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The configured URL is not of the form that the text names.
    #[error("auth.upstream_url must be http(s)://host[:port][/path], without credentials, query or fragment")]
    Url,
    /// The configured secret cannot stand in a header.
    #[error("auth.upstream_secret must be visible ASCII")]
    Secret,
    /// No certificate can be checked.
    #[error("the authorities for auth.upstream_url cannot be read")]
    Authorities(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// As many questions as allowed were under way all the time.
    #[error("the validator has too many questions to answer")]
    Busy,
    /// No answer within `auth.upstream_timeout_secs`.
    #[error("the validator does not answer in time")]
    Timeout,
    /// It could not be connected, or the connection broke.
    #[error("the validator cannot be reached")]
    Unreachable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It answered with a status that is neither consent nor refusal.
    #[error("the validator answered with status {0}")]
    Status(u16),
    /// Its answer broke off or is too long.
    #[error("the validator's answer cannot be read")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Its answer does not mean anything.
    #[error("the validator's answer cannot be understood: {0}")]
    Answer(&'static str),
}

/// Whom a proxy token stands for.
#[derive(Debug)]
pub(super) struct TokenOwner {
    pub(super) workspace: WorkspaceId,
    pub(super) user: Option<UserId>,
}

/// What an executor shows when it registers, in the form the service takes.
#[derive(Serialize)]
#[serde(tag = "scheme", rename_all = "snake_case")]
pub(super) enum ExecutorClaim<'a> {
    Bearer { token: &'a str, account_id: &'a str },
    AgentAssertion { assertion: &'a str, account_id: &'a str },
}

pub(super) struct Upstream {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    token_uri: Uri,
    executor_uri: Uri,
    secret: Option<HeaderValue>,
    timeout: Duration,
    permits: Semaphore,
    counters: Arc<TokenCounters>,
    last: Mutex<LastQuestion>,
}

/// How the validator did lately.
#[derive(Default)]
struct LastQuestion {
    failed: bool,
    answered_at: Option<Instant>,
}

impl Upstream {
    /// Checks the configuration; nothing is dialled yet.
    pub(super) fn new(
        url: &str,
        config: &crate::config::Auth,
        counters: Arc<TokenCounters>,
    ) -> Result<Self, UpstreamError> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        // So that it is given https addresses; TLS is put around it.
        connector.enforce_http(false);
        let token_uri = endpoint(url, "/internal/validate-proxy-token")?;
        let roots = match token_uri.scheme_str() {
            Some("https") => authorities(config.upstream_authorities.as_deref()).map_err(UpstreamError::Authorities)?,
            _ => RootCertStore::empty(),
        };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls(roots))
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        Ok(Self {
            client: Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(IDLE_TIMEOUT)
                .build(connector),
            token_uri,
            executor_uri: endpoint(url, "/internal/codex-auth/validate")?,
            secret: config.upstream_secret.as_ref().map(secret_header).transpose()?,
            timeout: Duration::from_secs(config.upstream_timeout_secs),
            permits: Semaphore::new(config.upstream_requests_max.clamp(1, Semaphore::MAX_PERMITS)),
            counters,
            last: Mutex::default(),
        })
    }

    /// Asks for the owner of a proxy token; `None` is a refusal. Dropping the future drops the request.
    pub(super) async fn validate_token(&self, token: &str) -> Result<Option<TokenOwner>, UpstreamError> {
        #[derive(Serialize)]
        struct Question<'a> {
            proxy_token: &'a str,
        }
        #[derive(Deserialize)]
        struct Answer {
            workspace_id: Option<String>,
            user_id: Option<String>,
        }
        let (status, body) = self.ask(&self.token_uri, &Question { proxy_token: token }).await?;
        self.judge(match status {
            StatusCode::OK => decode::<Answer>(&body).and_then(|answer| {
                let workspace =
                    answer.workspace_id.filter(|id| !id.is_empty()).ok_or(UpstreamError::Answer("no workspace"))?;
                Ok(Some(TokenOwner {
                    workspace: WorkspaceId::new(&workspace).map_err(|_| UpstreamError::Answer("not a workspace id"))?,
                    user: user(answer.user_id)?,
                }))
            }),
            StatusCode::UNAUTHORIZED => Ok(None),
            other => Err(UpstreamError::Status(other.as_u16())),
        })
    }

    /// Asks whose credential an executor shows; `None` is a refusal, and so is an answer that names nobody.
    pub(super) async fn validate_executor(&self, claim: &ExecutorClaim<'_>) -> Result<Option<UserId>, UpstreamError> {
        #[derive(Deserialize)]
        struct Answer {
            user_id: Option<String>,
        }
        let (status, body) = self.ask(&self.executor_uri, claim).await?;
        self.judge(match status {
            StatusCode::OK => decode::<Answer>(&body).and_then(|answer| user(answer.user_id)),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Ok(None),
            other => Err(UpstreamError::Status(other.as_u16())),
        })
    }

    /// One question, asked a second time if a kept connection turned out to be broken. Waiting for a permit and the
    /// exchange itself each take `auth.upstream_timeout_secs` at most.
    async fn ask(&self, uri: &Uri, question: &impl Serialize) -> Result<(StatusCode, Bytes), UpstreamError> {
        let body = Bytes::from(serde_json::to_vec(question).expect("a question holds only strings"));
        let permit = timeout(self.timeout, self.permits.acquire()).await;
        let _permit = self.counted(permit.map_err(|_| UpstreamError::Busy))?.expect("the semaphore is never closed");
        self.counters.upstream_requests.fetch_add(1, Relaxed);
        let exchange = async {
            match self.exchange(uri, body.clone()).await {
                // The service may close a kept connection just as the question leaves; validating twice harms nobody.
                Err(UpstreamError::Unreachable(cause)) if !refused_to_connect(&*cause) => {
                    self.exchange(uri, body).await
                }
                answer => answer,
            }
        };
        self.counted(timeout(self.timeout, exchange).await.unwrap_or(Err(UpstreamError::Timeout)))
    }

    async fn exchange(&self, uri: &Uri, body: Bytes) -> Result<(StatusCode, Bytes), UpstreamError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(secret) = &self.secret {
            request.headers_mut().insert("x-internal-secret", secret.clone());
        }
        trace::tell(request.headers_mut());
        let answer = self.client.request(request).await.map_err(|error| UpstreamError::Unreachable(error.into()))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(UpstreamError::Body)?;
        Ok((status, body.to_bytes()))
    }

    /// Counts a failure on the way to a verdict.
    fn counted<T>(&self, step: Result<T, UpstreamError>) -> Result<T, UpstreamError> {
        if step.is_err() {
            self.counters.upstream_failures.fetch_add(1, Relaxed);
            self.last.lock().unwrap_or_else(PoisonError::into_inner).failed = true;
        }
        step
    }

    /// The same at the end of the way.
    fn judge<T>(&self, verdict: Result<T, UpstreamError>) -> Result<T, UpstreamError> {
        if verdict.is_ok() {
            let now = Some(Instant::now());
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) =
                LastQuestion { failed: false, answered_at: now };
        }
        self.counted(verdict)
    }

    /// Whether the last question failed, and nobody can have been confirmed by the service within `stale`.
    pub(super) fn is_down(&self, stale: Duration) -> bool {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.failed && last.answered_at.is_none_or(|at| at.elapsed() >= stale)
    }
}

fn refused_to_connect(cause: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    cause.downcast_ref::<hyper_util::client::legacy::Error>().is_some_and(hyper_util::client::legacy::Error::is_connect)
}

/// Those by whom the service's certificate is checked: of that file, or of the system.
fn authorities(path: Option<&Path>) -> Result<RootCertStore, Box<dyn std::error::Error + Send + Sync>> {
    let mut roots = RootCertStore::empty();
    match path {
        Some(path) => {
            for certificate in CertificateDer::pem_file_iter(path)? {
                roots.add(certificate?)?;
            }
        }
        None => {
            // Systems keep certificates that are not understood here; one that is missing refuses the service later.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err("there is no certificate of an authority".into());
    }
    Ok(roots)
}

fn tls(roots: RootCertStore) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider knows the usual versions")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

fn endpoint(base: &str, path: &str) -> Result<Uri, UpstreamError> {
    let uri: Uri = base.parse().map_err(|_| UpstreamError::Url)?;
    let plain = matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.query().is_none()
        && !base.contains('#')
        && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if !plain {
        return Err(UpstreamError::Url);
    }
    format!("{}{path}", base.trim_end_matches('/')).parse().map_err(|_| UpstreamError::Url)
}

fn secret_header(secret: &Secret) -> Result<HeaderValue, UpstreamError> {
    let mut value = HeaderValue::from_str(secret.expose()).map_err(|_| UpstreamError::Secret)?;
    value.set_sensitive(true);
    Ok(value)
}

fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, UpstreamError> {
    // serde's own text could quote the answer, which is the tenant's business.
    serde_json::from_slice(body).map_err(|_| UpstreamError::Answer("not the expected JSON"))
}

/// An empty user is nobody.
fn user(id: Option<String>) -> Result<Option<UserId>, UpstreamError> {
    let id = id.filter(|id| !id.is_empty());
    id.map(|id| UserId::new(&id)).transpose().map_err(|_| UpstreamError::Answer("not a user id"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_base_url_keeps_its_path_and_loses_its_last_slash() {
        let uri = endpoint("http://validator:8080/base/", "/internal/x").unwrap();
        assert_eq!(uri, "http://validator:8080/base/internal/x");
    }

    #[test]
    fn a_base_url_with_anything_secret_or_unknown_in_it_is_refused() {
        for bad in ["ftp://v", "v:80", "/path", "http://user:pass@v", "http://v/?key=1", "http://v/#x", "", "http://"] {
            assert!(matches!(endpoint(bad, "/x"), Err(UpstreamError::Url)), "{bad:?}");
        }
    }

    #[test]
    fn a_secret_that_is_no_header_is_refused_at_start() {
        assert!(matches!(secret_header(&Secret::new("a\nb".into())), Err(UpstreamError::Secret)));
        let shown = format!("{:?}", secret_header(&Secret::new("hunter2".into())).unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
