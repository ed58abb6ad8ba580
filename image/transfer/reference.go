package transfer

import (
	"strings"

	"github.com/distribution/reference"
)

// normalize applies docker's rule for names in RepoTags: redis is docker.io/library/redis:latest.
func normalize(tag string) (string, error) {
	named, err := reference.ParseDockerRef(tag)
	if err != nil {
		return "", invalid("name %.80q in %s: %w", tag, dockerManifestsFile, err)
	}
	return named.String(), nil
}

// sameName reports whether docker would read two names as the same one: redis is docker.io/library/redis:latest.
func sameName(a, b string) bool {
	if a == b {
		return true
	}
	na, aerr := reference.ParseDockerRef(a)
	nb, berr := reference.ParseDockerRef(b)
	return aerr == nil && berr == nil && na.String() == nb.String()
}

// isTag applies containerd's rule for org.opencontainers.image.ref.name: it reports whether ref is only a tag, without
// a repository.
func isTag(ref string) bool { return ref != "" && !strings.ContainsAny(ref, "/:@") }

// tagOf returns the tag or digest in a full name, or the name itself if it has neither.
func tagOf(name string) string {
	rest := name[strings.LastIndexByte(name, '/')+1:]
	if i := strings.IndexAny(rest, ":@"); i >= 0 && i+1 < len(rest) {
		return rest[i+1:]
	}
	return name
}

// repoTag returns the name as docker shows it in RepoTags, such as redis:latest. It is "" for a name with a digest and
// no tag, or for one that isn't a reference, since `docker load` fails on these.
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
