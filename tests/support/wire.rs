//! An HTTP connection spoken by hand, for requests that no well-behaved client sends.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::PATIENCE;

pub struct Wire(TcpStream);

impl Wire {
    pub async fn connect(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    pub async fn send(&mut self, bytes: &str) {
        self.0.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// The first bytes that come.
    pub async fn receive(&mut self) -> String {
        let mut bytes = vec![0; 64 * 1024];
        let length = timeout(PATIENCE, self.0.read(&mut bytes)).await.expect("an answer in time").unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    /// Everything until the gateway closes the connection.
    pub async fn until_closed(&mut self) -> String {
        let mut bytes = Vec::new();
        // A reset is a close too.
        let _ = timeout(PATIENCE, self.0.read_to_end(&mut bytes)).await.expect("the gateway closes the connection");
        // After an upgrade frames follow, which are no text.
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
