import torch, sys
sys.path.insert(0,'/work/wt/replicate')
import pytest
from tests.kernels.clips import *
from vae_accel.kernels import bordered, conv, thin_conv, upsample_conv, group_norm_act, rms_norm_act
from tests.tolerances import assert_close

@pytest.mark.parametrize("space",["replicate","reflect"])
@pytest.mark.parametrize("shape",[(2,24,3,5,6),(1,40,2,4,7),(3,8,5,4)])
def test_b(device, shape, space):
    x=normal(*shape,device=device)
    y=bordered.bordered(x,border=space); assert torch.equal(x,y); assert_bordered(y,space); assert bordered.is_filled(y)
    for pf in (False,True):
        z=group_norm_act.group_norm_act(bordered.laid_out(x,border=space),4,None,None,1e-6,act=True,per_frame=pf and x.dim()==5)
        assert bordered.is_filled(z); assert_bordered(z,space)
        assert_close(z, group_norm_act.reference(x.double(),4,None,None,1e-6,act=True,per_frame=pf and x.dim()==5))
    z=rms_norm_act.rms_norm_act(bordered.laid_out(x,border=space),None,None,1e-6,act=True)
    assert bordered.is_filled(z); assert_bordered(z,space)
    assert_close(z, rms_norm_act.reference(x.double(),None,None,1e-6,act=True))

@pytest.mark.parametrize("space",["zeros","replicate","reflect"])
@pytest.mark.parametrize("before,after,T",[(2,0,3),(2,0,1),(1,1,4),(1,1,1)])
def test_c(device, space,before,after,T):
    x=normal(2,24,T,5,7,device=device); w,b=weights(40,24,3,3,3,device=device)
    o=dict(padding=(1,1),before=before,after=after,time="replicate",space=space)
    r=normal(2,40,T,5,7,device=device)
    y=conv._launch(x,w,b,before,None,r,1,after,"replicate",space,tile=SMALL)
    assert_bordered(y,space)
    assert_close(y,conv.reference(x.double(),w.double(),b.double(),residual=r.double(),**o))
    w,b=weights(3,24,3,3,3,device=device); del o["padding"]
    assert_close(thin_conv.thin_conv(x,w,b,**o),conv.reference(x.double(),w.double(),b.double(),padding=(1,1),**o))

@pytest.mark.parametrize("double",[False,True])
@pytest.mark.parametrize("T",[1,3])
def test_u(device,double,T):
    x=normal(2,24,T,3,5,device=device); w,b=weights(40,24,3,3,3,device=device)
    y=upsample_conv._launch(x,w,b,SMALL,double=double,space="replicate")
    assert_bordered(y,"replicate")
    ref=upsample_conv.reference(x.double(),w.double(),b.double(),double=double,space="replicate")
    assert y.shape==ref.shape
    e=(y.double()-ref).square().mean().sqrt()/ref.square().mean().sqrt()
    assert e<1e-3,e
