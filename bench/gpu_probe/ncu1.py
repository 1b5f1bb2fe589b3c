from harness import *
V={v['name']:v for v in json.load(open(D+'/variants.json'))}
n,k,g=8192,8192,128
w=Weights(n,k,g)
for M,c in [(int(a.split(':')[0]),a.split(':')[1]) for a in sys.argv[1:]]:
    v=[v for nm,v in V.items() if nm.endswith(c) and v['n']==8192][0]; kern=Kernel(v['name'],v['smem'])
    x=torch.randn(M,k,device='cuda').bfloat16(); y=torch.empty(M,n,dtype=torch.bfloat16,device='cuda')
    a=kern.args((v['grid_n'],(M+v['tile_m']-1)//v['tile_m'],1),v['threads'],(x.data_ptr(),w.wp.data_ptr(),w.sp.data_ptr(),y.data_ptr(),0),(M,k,n))
    kern.launch(a); torch.cuda.synchronize()
