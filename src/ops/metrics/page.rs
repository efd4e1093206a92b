//! The page `deploy/METRICS.md`, made of the table.

use super::{Kind, Label, Metric, TABLE, Unit, Values};

const HEAD: &str = "\
# Metrics

What `GET /metrics` on the operators' listener prints, in the text format of OpenMetrics. Made by
`exec-gateway generate metrics` of the program's own table. Seconds and bytes throughout; counters begin at zero with
the process. No label holds an id, a path or the name of a workspace.
";

impl Metric {
    /// Every metric for people, in Markdown.
    pub fn page() -> String {
        let (mut page, mut section) = (HEAD.to_owned(), "");
        for metric in TABLE {
            if metric.section != section {
                section = metric.section;
                page += &format!("\n## {section}\n\n| metric | kind | labels | meaning |\n|---|---|---|---|\n");
            }
            page += &metric.line();
        }
        page
    }

    fn line(&self) -> String {
        let kind = match (self.kind, self.unit) {
            (Kind::Counter, _) => "counter",
            (Kind::Gauge, Unit::None) => "gauge",
            (Kind::Gauge, Unit::Bytes) => "gauge, bytes",
            (Kind::Gauge, Unit::Seconds) => "gauge, seconds",
            (Kind::Histogram, _) => "histogram",
        };
        let labels: Vec<String> = self.labels.iter().map(Label::text).collect();
        format!("| `{}` | {kind} | {} | {} |\n", self.name(), labels.join("; "), self.help())
    }
}

impl Label {
    fn text(&self) -> String {
        let values = match self.values {
            Values::Words(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
            Values::Rule(rule) => rule.into(),
        };
        format!("**{}**: {values}", self.name)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    /// `REWRITE=1 cargo test` brings the file up to date after a change of the table.
    #[test]
    fn the_page_in_deploy_tells_of_every_metric() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/METRICS.md");
        if std::env::var_os("REWRITE").is_some() {
            fs::write(&path, Metric::page()).unwrap();
        }
        let text = fs::read_to_string(path).unwrap_or_default();
        assert!(text == Metric::page(), "deploy/METRICS.md is out of date: run this test with REWRITE=1");
    }

    #[test]
    fn every_metric_has_a_name_of_its_own_and_a_sentence() {
        let mut names = HashSet::new();
        for metric in TABLE {
            assert!(names.insert(metric.name()), "{} stands there twice", metric.name());
            assert!(metric.help().ends_with('.') && !metric.help().contains('|'), "{}", metric.name());
            assert!(metric.kind != Kind::Histogram || metric.unit == Unit::Seconds, "{}", metric.name());
        }
    }
}
