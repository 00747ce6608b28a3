import sys; sys.path[:0]=["tests/support","tests/distributed"]
import meshes, torch, shutil, json, os, glob
from gloo_workers import Workers
import functional_ckpt as fc
from pathlib import Path
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
import safetensors

def save(directory, layout):
    with fc.CheckpointManager(directory) as manager:
        h=manager.save(0, {"tree": meshes.tree(layout, filled=True)}); h.result(60)

if __name__=="__main__":
    w=Workers()
    for layout in [(2,),(4,),(2,2),(3,2)]:
        n=1
        for k in layout: n*=k
        p=Path(f"/tmp/f5dcp/{'x'.join(map(str,layout))}"); shutil.rmtree(p, ignore_errors=True)
        w.run(n, save, p, layout)
        item=p/"0"/"tree"
        print(layout, sorted(x.name+":"+str(x.stat().st_size) for x in item.iterdir()))
        want={name: meshes.whole(name,shape,dtype) for name,shape,dtype,_ in meshes.names(layout)}
        got={k: torch.zeros_like(v) for k,v in want.items()}
        inshards=set()
        for f in item.glob("*.safetensors"):
            with safetensors.safe_open(f,"pt") as s: inshards|=set(s.keys())
        print("not in tensors", set(want)-inshards, [x for x in inshards-set(want)])
        got={k:v for k,v in got.items() if k in inshards}
        dcp.load(got, storage_reader=HuggingFaceStorageReader(str(item)), no_dist=True)
        bad=[k for k in got if not torch.equal(got[k],want[k])]
        print("bad", bad)
        r=fc.restore(p/"0")["tree"]
        assert all(torch.equal(r[k],want[k]) for k in want)
    w.close()
