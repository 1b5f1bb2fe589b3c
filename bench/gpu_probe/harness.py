import ctypes, json, sys, os, statistics, time
import torch
D=os.path.dirname(os.path.abspath(__file__))
torch.cuda.init(); torch.zeros(1,device='cuda')
cu=ctypes.CDLL('libcuda.so.1')
packs={kb:ctypes.CDLL(D+f'/libpack{kb}.so') for kb in ('','-DKBMAJOR')}
def ck(r,what=''):
    if r!=0:
        s=ctypes.c_char_p(); cu.cuGetErrorName(r,ctypes.byref(s)); raise RuntimeError(f'{what}: {s.value}')
class Kernel:
    def __init__(self,name,smem):
        self.mod=ctypes.c_void_p(); self.fn=ctypes.c_void_p()
        data=open(f'{D}/{name}.cubin','rb').read()
        ck(cu.cuModuleLoadData(ctypes.byref(self.mod),data),name)
        ck(cu.cuModuleGetFunction(ctypes.byref(self.fn),self.mod,b'main'),name)
        if smem>48*1024: ck(cu.cuFuncSetAttribute(self.fn,8,smem),name)
        self.smem=smem
    def args(self,grid,threads,ptrs,ints):
        vals=[ctypes.c_uint64(p) for p in ptrs]+[ctypes.c_uint32(i) for i in ints]
        arr=(ctypes.c_void_p*len(vals))(*[ctypes.cast(ctypes.pointer(v),ctypes.c_void_p) for v in vals])
        return (grid,threads,arr,vals)
    def launch(self,a):
        g=a[0]
        r=cu.cuLaunchKernel(self.fn,g[0],g[1],g[2],a[1],1,1,self.smem,ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),a[2],None)
        if r: ck(r,'launch')
def bits(t): return t.view(torch.int16)
class Weights:
    def __init__(self,n,k,g,seed=0,kb=''):
        gen=torch.Generator().manual_seed(seed)
        self.n,self.k,self.g=n,k,g
        w=torch.randint(0,256,(n,k//2),dtype=torch.uint8,generator=gen)
        sz=torch.empty(k//g,n,2,dtype=torch.bfloat16)
        sz[...,0]=(torch.rand(k//g,n,generator=gen)*0.02+0.005).bfloat16()
        sz[...,1]=((torch.rand(k//g,n,generator=gen)-0.5)*0.05).bfloat16()
        t16=(n+15)//16; kbs=(k+63)//64
        parts=64//g if g<64 else 1; steps=kbs if g<64 else k//g
        wp=torch.zeros(t16*kbs*512,dtype=torch.uint8); sp=torch.zeros(t16*steps*parts*64,dtype=torch.uint8)
        f=packs[kb].pack_c; L=ctypes.c_int64; P=ctypes.c_void_p
        f(P(w.data_ptr()),P(sz.data_ptr()),L(n),L(k),L(g),L(0),L(n),P(wp.data_ptr()),P(sp.data_ptr()))
        self.w,self.sz=w.cuda(),sz.cuda(); self.wp,self.sp=wp.cuda(),sp.cuda()
    def deq(self):
        q=torch.stack((self.w>>4,self.w&15),-1).view(self.n,self.k).double()-8
        s=self.sz[...,0].double().t().repeat_interleave(self.g,1); z=self.sz[...,1].double().t().repeat_interleave(self.g,1)
        return q*s+z
def check(y,ref):
    y=y.double(); e=(y-ref)
    tot=(e.norm()/ref.norm()).item()
    def worst(dim):
        r=ref.norm(dim=dim); return ((e.norm(dim=dim)/r)[r>1e-3*r.max()]).max().item()
    return tot,worst(0),worst(1)
flush=torch.empty(64*1024*1024,dtype=torch.float32,device='cuda')
flush2=torch.zeros(64*1024*1024,dtype=torch.float32,device='cuda'); sink=torch.zeros(4,device='cuda')
def dirty(r): flush.fill_(float(r))
def clean(r): flush.fill_(float(r)); torch.sum(flush2,dim=0,out=sink[0])
def time_all(fns,reps=30,fl=None):
    fl=fl or dirty
    ev={k:[] for k in fns}
    for k,f in fns.items(): f(); f()
    torch.cuda.synchronize()
    for r in range(reps):
        for k,f in fns.items():
            a=torch.cuda.Event(enable_timing=True); b=torch.cuda.Event(enable_timing=True)
            fl(r); a.record(); f(); b.record(); ev[k].append((a,b))
    torch.cuda.synchronize()
    return {k:(statistics.median(t:=[a.elapsed_time(b)*1e3 for a,b in v]),min(t)) for k,v in ev.items()}
def kineto(fns,reps=8):
    from torch.profiler import profile, ProfilerActivity
    for f in fns.values(): f()
    torch.cuda.synchronize()
    out={}
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for r in range(reps):
            for k,f in fns.items(): flush.fill_(float(r)); f()
        torch.cuda.synchronize()
    evs=sorted([e for e in p.profiler.kineto_results.events() if str(e.device_type()).endswith('CUDA') and 'Memset' not in e.name()],key=lambda e:e.start_ns())
    # sequence: fill, then one or more kernels per fn
    seq=[]; cur=None
    for e in evs:
        if 'FillFunctor' in e.name() or 'fill' in e.name().lower(): cur=[]; seq.append(cur)
        elif cur is not None: cur.append(e.duration_ns()/1e3)
    names=list(fns)
    for i,s in enumerate(seq): out.setdefault(names[i%len(names)],[]).append(sum(s))
    return {k:statistics.median(v) for k,v in out.items()}
