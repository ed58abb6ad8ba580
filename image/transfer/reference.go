package transfer

import (
	"strings"

	"github.com/distribution/reference"
)

// normalize is docker's rule for the names in RepoTags: redis is docker.io/library/redis:latest.
func normalize(tag string) (string, error) {
	named, err := reference.ParseDockerRef(tag)
	if err != nil {
		return "", invalid("name %.80q in %s: %w", tag, dockerManifestsFile, err)
	}
	return named.String(), nil
}

// sameName reports whether two names mean the same image, as docker reads them: redis is
// docker.io/library/redis:latest.
func sameName(a, b string) bool {
	if a == b {
		return true
	}
	na, aerr := reference.ParseDockerRef(a)
	nb, berr := reference.ParseDockerRef(b)
	return aerr == nil && berr == nil && na.String() == nb.String()
}

// isTag is containerd's rule for org.opencontainers.image.ref.name: whether it is a tag, to
// which the repository is missing.
func isTag(ref string) bool { return ref != "" && !strings.ContainsAny(ref, "/:@") }

// tagOf is the tag or digest in a full name; the name itself where it has none.
func tagOf(name string) string {
	rest := name[strings.LastIndexByte(name, '/')+1:]
	if i := strings.IndexAny(rest, ":@"); i >= 0 && i+1 < len(rest) {
		return rest[i+1:]
	}
	return name
}

// repoTag is the name as docker shows it, redis:latest, for RepoTags: "" for one that has a
// digest and no tag, or is no reference at all, since `docker load` fails on them.
func repoTag(name string) string {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return ""
	}
	named = reference.TagNameOnly(named)
	tagged, ok := named.(reference.Tagged)
	if !ok {
		return ""
	}
	if named, err = reference.WithTag(reference.TrimNamed(named), tagged.Tag()); err != nil {
		return ""
	}
	return reference.FamiliarString(named)
}
