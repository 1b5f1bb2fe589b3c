from harness import *
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count)
V=json.load(open(D+'/variants.json'))
W={}
def weights(n,k,g,kb=''):
    if (n,k,g,kb) not in W: W[(n,k,g,kb)]=Weights(n,k,g,kb=kb)
    return W[(n,k,g,kb)]
t0=time.time()
empty=Kernel('empty',0)
groups={}
for v in V: groups.setdefault((v['n'],v['k'],v['g']),[]).append(v)
res=[]
for (n,k,g),vs in groups.items():
    w=weights(n,k,g); ref_w=w.deq()
    big=n*k>=4096*4096
    for v in vs: v['kern']=Kernel(v['name'],v['smem'])
    for M in (1,3,8,11,16,9):
        gen=torch.Generator(device='cuda').manual_seed(M)
        xb=torch.randn(M,k+8,generator=gen,device='cuda').bfloat16(); x=xb[:,:k]
        ref=x.double()@ref_w.t()
        fns={}
        for v in vs:
            if M>v['max_m'] or (v['max_m']>8 and M<=8 and (M!=3 or big)): continue
            y=torch.full((M+1,n+8),float('nan'),dtype=torch.bfloat16,device='cuda')
            a=v['kern'].args((v['grid_n'],(M+v['tile_m']-1)//v['tile_m'],1),v['threads'],(x.data_ptr(),weights(n,k,g,v['kb']).wp.data_ptr(),weights(n,k,g,v['kb']).sp.data_ptr(),y.data_ptr(),0),(M,k+8,n+8))
            v['kern'].launch(a)
            try: torch.cuda.synchronize()
            except Exception as e: print('FAILED',v['name'],M,e); sys.exit(1)
            yy=y[:M,:n]; c=check(yy,ref)
            untouched=bool(torch.isnan(y[M]).all()) and bool(torch.isnan(y[:,n:]).all())
            y1=y.clone(); v['kern'].launch(a); torch.cuda.synchronize(); same=torch.equal(bits(y1),bits(y))
            ok=max(c)<4e-3 and untouched and same
            if not ok or not big: print(('ok ' if ok else 'BAD'),v['name'],M,'%.2e %.2e %.2e'%c,untouched,same,flush=True)
            if big and M in (1,8,16): fns[v['name']]=(lambda kern=v['kern'],a=a:kern.launch(a))
        if big and M in (1,8,16):
            ae=empty.args((128,1,1),512,(0,0,0,0,0),(0,0,0)); fns['empty']=lambda ae=ae: empty.launch(ae)
            p=torch.ops.aten._convert_weight_to_int4pack(w.w,8); xc=x.contiguous()
            fns['torch int4']=lambda: torch.ops.aten._weight_int4pack_mm(xc,p,g,w.sz)
            wb=ref_w.bfloat16(); fns['bf16']=lambda: torch.mm(xc,wb.t())
            floor=(n*k/2+n*k/g*4+M*(n+k)*2)/4.3e6
            T=time_all(fns); TC=time_all(fns,fl=clean); e0,e1=T['empty'][0],TC['empty'][0]
            print(f'== n={n} k={k} g={g} M={M} floor {floor:.2f} us')
            for kk,(med,mn) in sorted(T.items(),key=lambda t:t[1]): print(f'   {kk:40s} event {med:7.2f} | less empty: dirty {med-e0:7.2f} clean {TC[kk][0]-e1:7.2f}',flush=True)
    print('t',round(time.time()-t0,1),flush=True)
