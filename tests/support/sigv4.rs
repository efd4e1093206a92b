//! Signs requests as codex's direct transport does (AWS Signature Version 4).

use std::time::{SystemTime, UNIX_EPOCH};

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use super::Credentials;

/// What an executor's process signs with.
pub struct Signer<'a> {
    pub key_id: &'a str,
    pub secret: &'a str,
    /// Seconds that its clock is ahead.
    pub ahead: i64,
}

impl<'a> Signer<'a> {
    pub fn of(credentials: &'a Credentials) -> Self {
        Self { key_id: &credentials.executor, secret: &credentials.token, ahead: 0 }
    }

    /// The headers that sign a request to this host. The query must be in order and escaped already.
    pub fn sign(&self, method: &str, host: &str, path_and_query: &str, body: &str) -> [(&'static str, String); 2] {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let time = time_text(now.checked_add_signed(self.ahead).unwrap());
        let (path, query) = path_and_query.split_once('?').unwrap_or((path_and_query, ""));
        let mut pairs: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty()).collect();
        pairs.sort();
        let canonical = format!(
            "{method}\n{path}\n{}\nhost:{host}\nx-amz-date:{time}\n\nhost;x-amz-date\n{}",
            pairs.join("&"),
            hex(&Sha256::digest(body))
        );
        let date = &time[..8];
        let scope = format!("{date}/eu-north-1/execute-api/aws4_request");
        let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex(&Sha256::digest(canonical)));
        let parts = [date, "eu-north-1", "execute-api", "aws4_request", &text];
        let key = format!("AWS4{}", self.secret).into_bytes();
        let signature = parts.iter().fold(key, |key, part| {
            let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
            mac.update(part.as_bytes());
            mac.finalize().into_bytes().to_vec()
        });
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders=host;x-amz-date, Signature={}",
            self.key_id,
            hex(&signature)
        );
        [("authorization", authorization), ("x-amz-date", time)]
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `20150830T123600Z`
fn time_text(secs: u64) -> String {
    let output = std::process::Command::new("date").args(["-u", "-d", &format!("@{secs}"), "+%Y%m%dT%H%M%SZ"]).output();
    String::from_utf8(output.unwrap().stdout).unwrap().trim().to_owned()
}
