import subprocess, json, sys, re, os
PT='/tmp/kiln/cuda/nvidia/cuda_nvcc/bin/ptxas'
OUT='/work/main/.gpu'
V=[]
KB=''
def add(kind,n,k,g,cfg,name,lo,hi,gm=False,extra=(),**kw):
    p=subprocess.run(['./emit',kind,'90',*map(str,(n,k,g,*cfg)),'t.ptx']+([str(int(gm))] if gm or extra else [])+list(extra),check=True,capture_output=True,text=True)
    grid_n,tile_m,threads,smem=map(int,p.stdout.split()[:4])
    asm(name,'sm_90a' if gm else 'sm_90')
    assert smem<=227*1024,(name,smem)
    V.append(dict(name=name,kind=kind,kb='',n=n,k=k,g=g,min_m=lo,max_m=hi,tile_m=tile_m,grid_n=grid_n,threads=threads,smem=smem,**kw))
def skinny(n,k,g,t,r,w,c,d=1):
    add('skinny',n,k,g,(t,r,w,c,d),f's_n{n}_k{k}_g{g}_t{t}r{r}w{w}c{c}d{d}',1 if t==1 else 9 if t==2 else 17,8*t)
def tile(n,k,g,r,t,wn,wm,wk,c,s,mb=1,e=0,lo=1,hi=1<<20):
    add('tile',n,k,g,(r,t,wn,wm,wk,c,s),f't_n{n}_k{k}_g{g}_r{r}t{t}n{wn}m{wm}k{wk}c{c}s{s}m{mb}'+(f'e{e}' if e else ''),lo,hi,False,[str(mb)]+([str(e)] if e else []),exact=e>1)
def wg(n,k,g,t,wn,c,s,b=1,mb=1,e=0,lo=1,hi=1<<20):
    add('tile',n,k,g,(1,t,wn,1,1,c,s),f'g_n{n}_k{k}_g{g}_t{t}n{wn}c{c}s{s}b{b}m{mb}'+(f'e{e}' if e else ''),lo,hi,b,[str(mb)]+([str(e)] if e else []),exact=e>1)
def i8(n,k,out,r,t,wn,wm,wk,c,s,lo=1,hi=1<<20):
    add('int8',n,k,out,(r,t,wn,wm,wk,c,s),f'i_n{n}_k{k}_o{out}_c{r}r{t}n{wn}m{wm}k{wk}c{c}s{s}',lo,hi,out=out)
def i8g(n,k,out,t,wn,c,s,lo=1,hi=1<<20):
    add('int8',n,k,out,(1,t,wn,1,1,c,s),f'i_n{n}_k{k}_o{out}_Gt{t}n{wn}c{c}s{s}',lo,hi,1,out=out)
def asm(name,arch='sm_90',ptx='t.ptx'):
    p=subprocess.run([PT,'-arch='+arch,'-v',ptx,'-o',f'{OUT}/{name}.cubin'],capture_output=True,text=True)
    regs=re.search(r'Used (\d+) reg',p.stderr); sp=re.search(r'(\d+) bytes spill stores',p.stderr)
    print(name,regs and regs[1],'spill',sp and sp[1], p.stderr if p.returncode or 'C75' in p.stderr else '')
    if p.returncode: sys.exit(1)
for f in os.listdir(OUT):
    if f.endswith('.cubin') and f!='read.cubin': os.remove(f'{OUT}/{f}')
asm('empty',ptx='empty.ptx')
exec(open(sys.argv[1]).read(),globals())
json.dump(V,open(f'{OUT}/variants.json','w'))
subprocess.run(['du','-sh',OUT])
