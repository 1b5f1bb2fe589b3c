import json,subprocess,re,os
PT='/tmp/kiln/cuda/nvidia/cuda_nvcc/bin/ptxas'
from concurrent.futures import ThreadPoolExecutor
V=[]
for line in open('rows.txt'):
    f=line.strip().split('|'); name,desc,isa=f[:3]; plan=dict(x.split('=') for x in f[3:]); d=dict(x.split('=') for x in desc.split()[1:])
    V.append(dict(name=name,desc=desc.replace(' device=cuda',''),isa=isa,op=desc.split()[0],plan={k:int(v) for k,v in plan.items()},d=d))
def asm(v):
    p=subprocess.run([PT,'-arch=sm_90a','-v',f"rows/{v['name']}.ptx",'-o',f"/work/main/.gpu/{v['name']}.cubin"],capture_output=True,text=True)
    sp=re.search(r'(\d+) bytes spill stores',p.stderr)
    if p.returncode or 'C75' in p.stderr or sp[1]!='0': print(v['desc'],p.stderr)
with ThreadPoolExecutor(2) as ex: list(ex.map(asm,V))
json.dump(V,open('/work/main/.gpu/rows.json','w'))
