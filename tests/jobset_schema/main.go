// Judges Kubernetes objects on standard input as a cluster would, without one: `go run . < objects.yaml`.
//
// A JobSet goes through its Go type (no unknown field), the schema and rules of its custom resource, and JobSet's own
// admission; each of its Jobs with its pods through what Kubernetes' API server does to a Job that is made. ConfigMaps
// and Secrets go through theirs. Prints one line an object; ends with status 1 when anything is wrong.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/batch"
	_ "k8s.io/kubernetes/pkg/apis/batch/install"
	"k8s.io/kubernetes/pkg/apis/core"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	corevalidation "k8s.io/kubernetes/pkg/apis/core/validation"
	jobregistry "k8s.io/kubernetes/pkg/registry/batch/job"
	jobsetv1 "sigs.k8s.io/jobset/api/jobset/v1alpha2"
	"sigs.k8s.io/jobset/pkg/webhooks"
	"sigs.k8s.io/yaml"
)

const namespace = "default"

func main() {
	reader, failed := utilyaml.NewYAMLReader(bufio.NewReader(os.Stdin)), false
	for count := 0; ; count++ {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			if count == 0 {
				fmt.Println("nothing to judge")
				os.Exit(1)
			}
			break
		}
		if err == nil && len(bytes.TrimSpace(document)) == 0 {
			continue
		}
		var meta metav1.PartialObjectMetadata
		if err == nil {
			err = yaml.Unmarshal(document, &meta)
		}
		if err == nil {
			err = judge(meta.Kind, document)
		}
		if err != nil {
			failed = true
			fmt.Printf("%s %s: %v\n", meta.Kind, meta.Name, err)
		} else {
			fmt.Printf("%s %s: good\n", meta.Kind, meta.Name)
		}
	}
	if failed {
		os.Exit(1)
	}
}

func judge(kind string, document []byte) error {
	switch kind {
	case "JobSet":
		return judgeJobSet(document)
	case "ConfigMap":
		var given corev1.ConfigMap
		var object core.ConfigMap
		if err := internal(document, &given, &given.ObjectMeta, &object); err != nil {
			return err
		}
		return corevalidation.ValidateConfigMap(&object).ToAggregate()
	case "Secret":
		var given corev1.Secret
		var object core.Secret
		if err := internal(document, &given, &given.ObjectMeta, &object); err != nil {
			return err
		}
		return corevalidation.ValidateSecret(&object).ToAggregate()
	}
	return fmt.Errorf("no such kind is known")
}

// internal reads an object strictly and turns it into what the API server works with.
func internal(document []byte, given runtime.Object, meta *metav1.ObjectMeta, object runtime.Object) error {
	if err := yaml.UnmarshalStrict(document, given); err != nil {
		return err
	}
	meta.Namespace = namespace
	legacyscheme.Scheme.Default(given)
	return legacyscheme.Scheme.Convert(given, object, nil)
}

func judgeJobSet(document []byte) error {
	document, err := judgeResource(document)
	if err != nil {
		return err
	}
	var given jobsetv1.JobSet
	if err := yaml.UnmarshalStrict(document, &given); err != nil {
		return err
	}
	given.Namespace = namespace
	ctx := context.Background()
	webhook, err := webhooks.NewJobSetWebhook(nil)
	if err != nil {
		return err
	}
	if err := webhook.Default(ctx, &given); err != nil {
		return err
	}
	if _, err := webhook.ValidateCreate(ctx, &given); err != nil {
		return err
	}
	for _, replicated := range given.Spec.ReplicatedJobs {
		if err := judgeJob(ctx, given.Name, replicated); err != nil {
			return err
		}
	}
	return nil
}

// judgeResource holds a JobSet against the schema and the rules of its custom resource; returns it with their defaults.
func judgeResource(document []byte) ([]byte, error) {
	folder, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/jobset").Output()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(strings.TrimSpace(string(folder)), "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var definition apiextensionsv1.CustomResourceDefinition
	if err := yaml.Unmarshal(text, &definition); err != nil {
		return nil, err
	}
	var schema apiextensions.JSONSchemaProps
	versioned := definition.Spec.Versions[0].Schema.OpenAPIV3Schema
	if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(versioned, &schema, nil); err != nil {
		return nil, err
	}
	var content map[string]any
	if err := yaml.Unmarshal(document, &content); err != nil {
		return nil, err
	}
	structural, err := structuralschema.NewStructural(&schema)
	if err != nil {
		return nil, err
	}
	defaulting.Default(content, structural)
	validator, _, err := validation.NewSchemaValidator(&schema)
	if err != nil {
		return nil, err
	}
	if found := validation.ValidateCustomResource(nil, content, validator); len(found) > 0 {
		return nil, found.ToAggregate()
	}
	rules := cel.NewValidator(structural, true, celconfig.PerCallLimit)
	found, _ := rules.Validate(context.Background(), field.NewPath(""), structural, content, nil, celconfig.RuntimeCELCostBudget)
	if len(found) > 0 {
		return nil, found.ToAggregate()
	}
	return yaml.Marshal(content)
}

// judgeJob does what the API server does when JobSet makes a Job.
func judgeJob(ctx context.Context, name string, replicated jobsetv1.ReplicatedJob) error {
	made := batchv1.Job{Spec: replicated.Template.Spec}
	made.Name, made.Namespace = name+"-"+replicated.Name+"-0", namespace
	made.UID = "8f1b9f6e-2f0c-4b3e-9c55-0a3c2f1e5d11"
	legacyscheme.Scheme.Default(&made)
	var job batch.Job
	if err := legacyscheme.Scheme.Convert(&made, &job, nil); err != nil {
		return err
	}
	ctx = request.WithRequestInfo(request.WithNamespace(ctx, namespace), &request.RequestInfo{APIGroup: "batch", APIVersion: "v1"})
	jobregistry.Strategy.PrepareForCreate(ctx, &job)
	return jobregistry.Strategy.Validate(ctx, &job).ToAggregate()
}
