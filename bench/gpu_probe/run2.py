from harness import *
V={v['name']:v for v in json.load(open(D+'/variants.json'))}
mod=ctypes.c_void_p(); ck(cu.cuModuleLoadData(ctypes.byref(mod),open(D+'/read.cubin','rb').read()))
flush2=torch.zeros(64*1024*1024,dtype=torch.float32,device='cuda'); sink=torch.zeros(1,device='cuda')
def dirty(r): flush.fill_(float(r))
def clean(r):
    flush.fill_(float(r)); torch.sum(flush2,dim=0,out=sink[0])
def hot(r): pass
def timeit(fns,fl,reps=25):
    ev={k:[] for k in fns}
    for k,f in fns.items(): f(); f()
    torch.cuda.synchronize()
    for r in range(reps):
        for k,f in fns.items():
            a=torch.cuda.Event(enable_timing=True); b=torch.cuda.Event(enable_timing=True)
            if fl is hot: flush[:16*1024*1024].fill_(1.0) if False else None; f()
            else: fl(r)
            a.record(); f(); b.record(); ev[k].append((a,b))
    torch.cuda.synchronize()
    return {k:statistics.median([a.elapsed_time(b)*1e3 for a,b in v]) for k,v in ev.items()}
n,k,g=8192,8192,128
w=Weights(n,k,g)
nb=w.wp.numel()
fns={}
def readk(name,grid,block,smem=0):
    fn=ctypes.c_void_p(); ck(cu.cuModuleGetFunction(ctypes.byref(fn),mod,name.encode()))
    if smem: ck(cu.cuFuncSetAttribute(fn,8,smem))
    vals=[ctypes.c_uint64(w.wp.data_ptr()),ctypes.c_uint64(nb//16),ctypes.c_uint64(sink.data_ptr())]
    arr=(ctypes.c_void_p*3)(*[ctypes.cast(ctypes.pointer(v),ctypes.c_void_p) for v in vals])
    def f(): ck(cu.cuLaunchKernel(fn,grid,1,1,block,1,1,smem,ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),arr,None))
    f.keep=(vals,arr)
    fns[f'{name} {grid}x{block}']=f
readk('r8c',132,512); readk('r8i',132,512); readk('r16c',132,512); readk('r8c',132,1024); readk('r8i',264,512); readk('r4c',264,1024); readk('r8i',528,512); readk('r4c',528,512); readk('bulk',132,32,200*1024)
empty=Kernel('empty',0); ae=empty.args((128,1,1),512,(0,0,0,0,0),(0,0,0)); fns['empty']=lambda: empty.launch(ae)
for M in (1,8,16):
    x=torch.randn(M,k,device='cuda').bfloat16(); y=torch.empty(M,n,dtype=torch.bfloat16,device='cuda')
    for name,v in V.items():
        if v['n']==n and v['k']==k and (v['max_m']>8)==(M>8):
            kern=v.setdefault('kern',Kernel(name,v['smem']))
            a=kern.args((v['grid_n'],1,1),v['threads'],(x.data_ptr(),w.wp.data_ptr(),w.sp.data_ptr(),y.data_ptr(),0),(M,k,n))
            fns[f'{name[16:]} M={M}']=(lambda kern=kern,a=a,x=x,y=y: kern.launch(a))
T={f.__name__:timeit(fns,f) for f in (dirty,clean,hot)}
for kk in fns: print(f'{kk:30s}'+''.join(f' {n_} {T[n_][kk]-T[n_]["empty"]:7.2f}' for n_ in T),flush=True)
