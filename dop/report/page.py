"""The report's style sheet and script: system fonts, light and dark, nothing from the network."""

STYLE = """
:root{--bg:#fff;--ink:#1b1f24;--muted:#646c76;--grid:#e3e6ea;--panel:#f6f7f9;--s1:#3b6fb6;
--s2:#c8842b;--s3:#3a8f6b;--s4:#b4524d;--s5:#7b5ea7;--s6:#4f8f9d;--s7:#93764f}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e6e9ed;--muted:#98a1ac;
--grid:#2b3138;--panel:#1c2026;--s1:#7aa7e6;--s2:#e0a757;--s3:#6cc09b;--s4:#df837d;--s5:#ad94d8;
--s6:#7fc0ce;--s7:#c2a478}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 28px 60px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0}
h2{font-size:20px;margin:0 0 4px}
h3{font-size:15px;margin:26px 0 6px}
h4{font-size:13px;margin:0 0 6px;color:var(--muted);font-weight:600}
p{margin:0 0 10px}
header .path{font-weight:600;margin:2px 0 0;overflow-wrap:anywhere}
.lead{font-size:17px;margin:14px 0 0}
.muted,footer{color:var(--muted);font-size:13.5px;overflow-wrap:anywhere}
.warn{border-left:3px solid var(--s4);padding-left:10px;margin:10px 0 0}
section,footer{border-top:1px solid var(--grid);padding-top:22px;margin-top:30px}
.figures{display:flex;flex-wrap:wrap;gap:12px 40px;padding-top:18px;margin-top:22px}
.figures b{display:block;font-size:22px;font-variant-numeric:tabular-nums;line-height:1.25}
.figures span{color:var(--muted);font-size:13px}
figure{margin:6px 0 10px;overflow-x:auto}
svg.wide{min-width:760px}
svg{display:block;width:100%;height:auto;font-family:inherit}
svg text{font-family:inherit!important}
.two{display:grid;grid-template-columns:1fr 1fr;gap:0 28px;align-items:start}
.code{display:grid;grid-template-columns:1fr 1fr;gap:16px}
.code>div{min-width:0}
@media (max-width:820px){.two,.code{grid-template-columns:1fr}}
pre{margin:0;padding:12px 14px;background:var(--panel);border-radius:6px;overflow:auto;
max-height:560px;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--grid);
white-space:nowrap}
th{color:var(--muted);font-weight:600;cursor:pointer;user-select:none}
th.t,td.t{text-align:left;white-space:normal;overflow-wrap:anywhere}
td.t{min-width:90px}
th.n,td.n{text-align:left}
td.n{font-size:11.5px;line-height:1.3;white-space:normal;overflow-wrap:anywhere}
nav{position:sticky;top:0;background:var(--bg);padding:12px 0;margin-top:18px;z-index:1}
select{font:inherit;padding:4px 8px;color:inherit;background:var(--panel);max-width:100%;
border:1px solid var(--grid);border-radius:6px}
@media print{nav{display:none}.family[hidden]{display:block!important}pre{max-height:none}}
"""
"""Without the script every family is shown, one below the other."""

SCRIPT = """
const choose=document.getElementById('choose');
if(choose){choose.closest('nav').hidden=false;
const show=()=>document.querySelectorAll('.family').forEach(s=>s.hidden=s.id!==choose.value);
if(/^#f\\d+$/.test(location.hash))choose.value=location.hash.slice(1);
choose.onchange=()=>{history.replaceState(null,'','#'+choose.value);show()};show()}
const number=t=>{const v=parseFloat(t.replace(/,/g,''));return isNaN(v)?null:v};
document.querySelectorAll('th').forEach(th=>th.onclick=()=>{
const body=th.closest('table').tBodies[0],i=th.cellIndex,up=th.dataset.up!=='1';
th.dataset.up=up?'1':'';
[...body.rows].sort((a,b)=>{const x=a.cells[i].textContent,y=b.cells[i].textContent,
n=number(x),m=number(y),c=n!==null&&m!==null?n-m:x.localeCompare(y);return up?c:-c})
.forEach(r=>body.append(r))});
"""
