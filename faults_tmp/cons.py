import sys; sys.path[:0]=["tests/support"]
import torch, shutil, os, math
from gloo_workers import Workers
import functional_ckpt as fc
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Shard, Replicate
SH={"a":(7,5),"b":(10,3),"c":(4,),"odd":(5,),"cols":(6,7)}
def tree(mesh):
    torch.manual_seed(0)
    full={k: torch.randn(s) for k,s in SH.items()}
    if mesh is None: return full
    return {k: distribute_tensor(v, mesh, [Shard(1 if k=="cols" else 0)]) for k,v in full.items()}
def save(d):
    mesh=init_device_mesh("cpu",(4,))
    with fc.CheckpointManager(d) as m: m.save(0,{"model":tree(mesh)})
if __name__=="__main__":
    p=Path("/tmp/f5cons"); shutil.rmtree(p,ignore_errors=True)
    w=Workers(); w.run(4,save,p); w.close()
    item=p/"0/model"
    import safetensors.torch as st
    print([x.name for x in item.iterdir()], {x.name: {k:tuple(v.shape) for k,v in st.load_file(x).items()} for x in item.glob("*.safetensors")})
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
    import inspect; print(inspect.signature(consolidate_safetensors_files))
    out=p/"out"; out.mkdir()
    consolidate_safetensors_files(str(item),str(out), fqn_to_index_mapping={k:1 for k in SH})
    for x in out.iterdir(): print(x.name)
    got={}
    for x in out.glob("*.safetensors"): got|=st.load_file(x)
    want=tree(None); print({k: torch.equal(got[k],want[k]) for k in want}, set(got)-set(want))
