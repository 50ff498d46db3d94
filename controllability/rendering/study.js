// colours and marks of the number that the slider names: blue adds to the patch, red takes from it, the line below is as thick as the share
const of=JSON.parse(document.getElementById('numbers').textContent),slider=document.getElementById('which');
function show(){const name=Object.keys(of)[slider.value],v=of[name],most=Math.max(...v.map(Math.abs))||1;
document.getElementById('said').textContent=name;slider.setAttribute('aria-valuetext',name);
document.querySelectorAll('.chunk').forEach((e,i)=>{const a=Math.abs(v[i])/most;
e.style.background=`rgba(${v[i]<0?'190,30,45':'30,100,190'},${(.45*a).toFixed(3)})`;
e.style.borderBottomWidth=(1+5*a).toFixed(1)+'px';e.style.borderBottomStyle=v[i]<0?'dotted':'solid';
e.classList.toggle('best',v[i]===Math.max(...v));e.querySelector('sup').textContent=(100*v[i]).toFixed(0)+'%';});}
slider.addEventListener('input',show);show();
