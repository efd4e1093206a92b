//! A known proxy token against one SHA-256 of it: what a caller's credential costs on every request.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::hint::black_box;

use sha2::{Digest, Sha256};
use support::TestGateway;

/// Short, so that few of them are interrupted, and many.
const CHECKS: usize = 500;
const ROUNDS: usize = 4001;

#[tokio::main]
async fn main() {
    let gateway = TestGateway::with(|config| config.workspace.calls_per_second_max = 0).await;
    let token = gateway.caller("w").await.token.unwrap();
    let auth = gateway.gateway.api().corridor.auth.clone();
    auth.principal(&token).await.unwrap();

    let (mut hits, mut digests) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        hits.push(
            rig::seconds(async {
                for _ in 0..CHECKS {
                    black_box(auth.principal(black_box(&token)).await.unwrap());
                }
            })
            .await,
        );
        digests.push(
            rig::seconds(async {
                for _ in 0..CHECKS {
                    black_box(Sha256::digest(black_box(&token)));
                }
            })
            .await,
        );
    }
    let nanoseconds = |seconds: &[f64]| format!("{:.0} ns", rig::median(seconds) / CHECKS as f64 * 1e9);
    rig::head("token");
    let ratio = rig::ratio(&hits, &digests);
    rig::line("cache hit, one SHA-256", nanoseconds(&hits), nanoseconds(&digests), ratio, "<= 2");
}
