//! Table: rows printed in aligned columns. It never cuts a value.

use std::fmt;

/// Headings and rows; every row has a cell for every heading.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headings: Vec<String>) -> Self {
        Self { rows: vec![headings] }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = vec![0; self.rows[0].len()];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks() {
        let mut table = Table::new(vec!["ID".into(), "NAME".into()]);
        table.row(vec!["tok_1".into(), String::new()]);
        table.row(vec!["é".into(), "box".into()]);
        assert_eq!(table.to_string(), "ID     NAME\ntok_1\né      box\n");
    }
}
