//! What the page looks like beside its pictures. A light page everywhere, because the
//! pictures are drawn for one.

/// The style sheet.
pub(super) const CSS: &str = "\
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f7; color: #1f2933;
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
main { max-width: 1008px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 78ch; }
p.lead { color: #4b5563; }
section { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px;
  padding: 20px 24px; margin: 20px 0 0; }
div.table { overflow-x: auto; margin: 12px 0 4px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: left; padding: 6px 20px 6px 0; border-bottom: 1px solid #e8ebef;
  vertical-align: baseline; }
th { color: #4b5563; font-weight: 600; border-bottom-color: #c3c9d1; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.ok td:first-child::before { content: '\\2713\\a0'; color: #007a5a; font-weight: 700; }
tr.short td:first-child::before { content: '\\2717\\a0'; color: #b23a00; font-weight: 700; }
tr.short td { background: #fdf1ea; }
figure { margin: 16px 0 4px; }
figcaption { color: #4b5563; font-size: 14px; line-height: 1.5; margin-top: 12px; max-width: 92ch; }
svg { display: block; max-width: 100%; height: auto; background: #fff; }
svg text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
  paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-linejoin: round; }
svg rect { shape-rendering: crispEdges; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
";
