package image

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Platform says which manifests of an index count, and which of them fits best.
type Platform struct {
	name string
	platforms.MatchComparer
	// Asked for: a manifest that is in no index must fit, too.
	strict bool
}

// ParsePlatform reads containerd's syntax, os/arch[/variant] or a part of it. "local" is this
// machine's platform, but always Linux: images are Linux's, whatever looks at them. So is an
// empty string, which chooses from an index, and takes a manifest that is alone as it is.
// InvalidArgument for what is none.
func ParsePlatform(s string) (*Platform, error) {
	var p v1.Platform
	if s == "" || s == "local" {
		p = platforms.DefaultSpec()
		p.OS = "linux"
	} else {
		var err error
		if p, err = platforms.Parse(s); err != nil {
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "platform %.80q is not os/arch[/variant], nor local", s)
		}
	}
	return &Platform{platforms.FormatAll(p), platforms.Only(p), s != ""}, nil
}

func (p *Platform) String() string { return p.name }
