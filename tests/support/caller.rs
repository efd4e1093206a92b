//! An HTTP client of the gateway's API: one workspace's token, plain requests, answers as JSON.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use super::described;

/// A caller with a bearer token, or none.
#[derive(Clone)]
pub struct Caller {
    client: Client<HttpConnector, Full<Bytes>>,
    pub address: SocketAddr,
    pub token: Option<String>,
}

/// Why there is no answer.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Caller {
    pub fn new(address: SocketAddr, token: Option<String>) -> Self {
        Self { client: Client::builder(TokioExecutor::new()).build_http(), address, token }
    }

    pub async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
        let answer = self.try_send(method, path, headers, body).await.unwrap();
        // On every route of the API, whatever a test is about; operators' routes do without.
        if path.starts_with("/api/") || path.starts_with("/cloud/") || path.starts_with("/bridge/") {
            assert!(answer.headers.contains_key("x-request-id"), "{answer:?}");
            if matches!(answer.status.as_u16(), 429 | 503) {
                let seconds = answer.header("retry-after").and_then(|value| value.parse::<u32>().ok());
                assert!(seconds.is_some_and(|seconds| seconds > 0), "{answer:?}");
            }
        }
        if let Some(fault) = described::fault(method, path, &answer) {
            panic!("{fault}");
        }
        answer
    }

    pub async fn try_send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Answer, Failure> {
        Answer::whole(self.request(method, path, headers, body).await?).await
    }

    /// A request whose answer has begun; dropping it hangs up.
    pub async fn open(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Response<Incoming> {
        self.request(method, path, &[], body).await.unwrap()
    }

    /// A request whose answer has begun, or the reason why it has not.
    pub async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Ok(self.client.request(request.body(Full::new(body.into()))?).await?)
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send("POST", path, &[(CONTENT_TYPE.as_str(), "application/json")], body.to_string()).await
    }

    pub async fn environments(&self) -> Vec<String> {
        let answer = self.post("/api/connectors/envs/list", json!({})).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let names = answer.json()["envs"].as_array().unwrap().clone();
        names.iter().map(|env| env["name"].as_str().unwrap().to_owned()).collect()
    }

    /// One tool call, whatever becomes of it.
    pub async fn tool(&self, environment: &str, tool: &str, arguments: Value) -> Answer {
        let path = format!("/api/connectors/envs/{environment}/tool/call");
        self.post(&path, json!({ "tool": tool, "arguments": arguments })).await
    }

    /// One tool call that is answered with a result.
    pub async fn result(&self, environment: &str, tool: &str, arguments: Value) -> Value {
        let answer = self.tool(environment, tool, arguments).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }

    /// A shell command's structured result.
    pub async fn shell(&self, environment: &str, arguments: Value) -> Value {
        self.result(environment, "shell", arguments).await["structuredContent"].clone()
    }
}

impl Answer {
    /// Reads an answer to its end.
    pub async fn whole(response: Response<Incoming>) -> Result<Self, Failure> {
        let (head, body) = response.into_parts();
        Ok(Self { status: head.status, headers: head.headers, body: body.collect().await?.to_bytes() })
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The code in the error envelope.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_else(|| panic!("no error code: {self:?}")).to_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}
