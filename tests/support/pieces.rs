//! An HTTP request whose body the test sends piece by piece, on a connection of its own.

use std::net::SocketAddr;

use bytes::Bytes;
use exec_gateway::edge::pipe::{PipeWriter, pipe};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use super::caller::{Answer, Failure};

/// A request under way; dropping it hangs up.
pub struct Pieces {
    body: PipeWriter,
    answer: AbortOnDropHandle<Result<Response<Incoming>, Failure>>,
    _connection: AbortOnDropHandle<()>,
}

impl Pieces {
    /// Sends the head. A body of no known length is chunked.
    pub async fn send(
        address: SocketAddr,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        length: Option<u64>,
    ) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(async move { drop(connection.await) });
        let (body, pieces) = pipe(1, length);
        let mut request = Request::builder().method(method).uri(path).header("host", address.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(pieces).unwrap();
        let answer = tokio::spawn(async move { Ok(client.send_request(request).await?) });
        Self { body, answer: AbortOnDropHandle::new(answer), _connection: AbortOnDropHandle::new(connection) }
    }

    /// Sends a piece of the body, as soon as the connection takes it.
    pub async fn piece(&self, bytes: impl Into<Bytes>) -> Result<(), Failure> {
        Ok(self.body.write(bytes.into()).await?)
    }

    /// Ends the body.
    pub async fn end(&self) {
        let _ = self.body.end().await;
    }

    /// The answer's head.
    pub async fn begun(&mut self) -> Result<Response<Incoming>, Failure> {
        (&mut self.answer).await.unwrap()
    }

    /// The whole answer.
    pub async fn answer(mut self) -> Result<Answer, Failure> {
        Answer::whole(self.begun().await?).await
    }
}
