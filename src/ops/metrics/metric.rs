//! Metric: one row of the table, with its name as it is scraped.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit as Suffix;

use super::series::Series;

/// One row of the table.
#[derive(Debug)]
pub struct Metric {
    /// Under which heading it stands.
    pub section: &'static str,
    pub(super) field: &'static str,
    /// What it counts.
    pub kind: Kind,
    /// In which unit.
    pub unit: Unit,
    /// By what it is told apart.
    pub labels: &'static [Label],
    pub(super) help: &'static [&'static str],
}

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until the process ends.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts durations by how long they were.
    Histogram,
}

/// In which unit a metric is, always the base unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    None,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
}

/// One label.
#[derive(Debug)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// What it may be.
    pub values: Values,
}

/// The values of a label: few, and known when the gateway is built.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// These.
    Words(&'static [&'static str]),
    /// What this sentence says.
    Rule(&'static str),
}

impl Values {
    pub(super) fn words(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Words(words) => Some(words),
            Self::Rule(_) => None,
        }
    }
}

impl Metric {
    /// Its name without the ending of its unit and kind.
    fn stem(&self) -> String {
        // Those of the process have the names that every program gives them.
        if self.field.starts_with("process_") { self.field.into() } else { format!("exec_gateway_{}", self.field) }
    }

    /// Its name as it is scraped; the series of a histogram have further endings.
    pub fn name(&self) -> String {
        let unit = match self.unit {
            Unit::None => "",
            Unit::Bytes => "_bytes",
            Unit::Seconds => "_seconds",
        };
        let kind = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{kind}", self.stem())
    }

    /// What it says, on one line.
    pub fn help(&self) -> String {
        self.help.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    pub(super) fn print(&self, series: &dyn Series, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        };
        let unit = match self.unit {
            Unit::None => None,
            Unit::Bytes => Some(Suffix::Bytes),
            Unit::Seconds => Some(Suffix::Seconds),
        };
        series.print(self, &mut encoder.encode_descriptor(&self.stem(), &self.help(), unit.as_ref(), kind)?)
    }
}
