//! Every metric with its help text. No ids and no tenant names in labels.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// The gateway's counters.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Tool calls by tool and outcome.
    pub calls: Family<CallLabels, Counter>,
    /// Executor registrations by outcome.
    pub registrations: Family<OutcomeLabel, Counter>,
    /// Executor sockets by how they ended.
    pub links_ended: Family<OutcomeLabel, Counter>,
    /// Harness sockets by how they ended.
    pub harnesses_ended: Family<OutcomeLabel, Counter>,
    /// Frames dropped because they do not decode or may not be there.
    pub frames_dropped: Counter,
    /// Streams reset because their reader was too slow.
    pub streams_overrun: Counter,
    /// Bytes for slow harnesses written to disk.
    pub spilled_bytes: Counter,
    /// Frames refused because a harness was too far behind.
    pub spill_overruns: Counter,
    /// Frames for which a harness that was too far behind was waited for, and its link read more slowly.
    pub spill_waits: Counter,
    /// Panics of connection and link tasks.
    pub panics: Counter,
}

/// Labels of [`Metrics::calls`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    /// The tool.
    pub tool: &'static str,
    /// `ok`, `failed` (the tool says so) or an error code.
    pub outcome: &'static str,
}

/// How something ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabel {
    /// A word of a closed list.
    pub outcome: &'static str,
}

/// Values that other parts count or know themselves, read at each scrape.
pub type Readings = Arc<dyn Fn() -> Vec<Reading> + Send + Sync>;

/// One value read at a scrape.
pub struct Reading {
    /// Name without prefix.
    pub name: &'static str,
    /// Help text.
    pub help: &'static str,
    /// The value.
    pub value: Value,
}

/// Its kind.
pub enum Value {
    /// Only grows.
    Counter(u64),
    /// Goes up and down.
    Gauge(u64),
}

impl Metrics {
    /// A registry that writes these counters and the readings.
    pub fn registry(&self, readings: Readings) -> Registry {
        let mut registry = Registry::with_prefix("exec_gateway");
        registry.register("calls", "Tool calls by tool and outcome", self.calls.clone());
        registry.register("registrations", "Executor registrations by outcome", self.registrations.clone());
        registry.register("links_ended", "Executor sockets by how they ended", self.links_ended.clone());
        registry.register("harnesses_ended", "Harness sockets by how they ended", self.harnesses_ended.clone());
        registry.register("frames_dropped", "Frames dropped as undecodable or misplaced", self.frames_dropped.clone());
        registry.register(
            "streams_overrun",
            "Streams reset because their reader was too slow",
            self.streams_overrun.clone(),
        );
        registry.register("spilled_bytes", "Bytes for slow harnesses written to disk", self.spilled_bytes.clone());
        registry.register(
            "spill_overruns",
            "Frames refused because a harness was too far behind",
            self.spill_overruns.clone(),
        );
        registry.register("spill_waits", "Frames that made a link wait for a slow harness", self.spill_waits.clone());
        registry.register("panics", "Panics of tasks; each ended one connection", self.panics.clone());
        registry.register_collector(Box::new(ReadingsCollector(readings)));
        registry
    }
}

struct ReadingsCollector(Readings);

impl std::fmt::Debug for ReadingsCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReadingsCollector")
    }
}

impl Collector for ReadingsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for Reading { name, help, value } in (self.0)() {
            match value {
                Value::Counter(count) => {
                    let metric = ConstCounter::new(count);
                    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)?;
                }
                Value::Gauge(level) => {
                    let metric = ConstGauge::new(i64::try_from(level).unwrap_or(i64::MAX));
                    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)?;
                }
            }
        }
        Ok(())
    }
}
