import numpy
from onnx import helper

from lightning_compress.export.onnx.qdq.graph import Graph
from tests.export.qdq.graphs import computed, model, node


def example():
    nodes = [node("Mul", ["x", "two"], "a"), node("Add", ["a", "unseen"], "b"), node("Neg", ["a"], "y")]
    return model(nodes, {"two": numpy.float32(2), "unseen": numpy.float32(1)})


def test_what_no_output_needs_goes_and_the_model_given_stays():
    made = example()
    graph = Graph(made)
    graph.drop_unused()
    assert [one.op_type for one in graph.nodes] == ["Mul", "Neg"]
    assert graph.constants == ["two"]
    assert len(made.graph.node) == 3
    x = numpy.ones((1, 2), numpy.float32)
    assert numpy.array_equal(computed(graph.model(), x=x)[0], -2 * x)


def test_names_are_new_and_constants_can_give_theirs_to_a_node():
    graph = Graph(example())
    assert [graph.new_name("a"), graph.new_name("a"), graph.new_name("free")] == ["a_2", "a_3", "free"]
    assert graph.add_constant("two", numpy.float32(3)) == "two_2"
    graph.take_constant("two")
    graph.nodes.insert(0, node("Neg", ["two_2"], "two"))
    graph.drop_unused()
    assert computed(graph.model(), x=numpy.ones((1, 1), numpy.float32))[0].item() == 3.0


def test_bodies_of_branches_count_as_takers():
    def body(name):
        nodes = [node("Mul", ["x", "inner"], name)]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, 1, None)])

    nodes = [node("If", ["flag"], "y", then_branch=body("then"), else_branch=body("else"))]
    graph = Graph(model(nodes, {"flag": numpy.array(True), "inner": numpy.float32(2)}))
    graph.drop_unused()
    assert set(graph.constants) == {"flag", "inner"}
    assert len(graph.consumers()["inner"]) == 2


def test_nothing_is_left_that_tells_of_sources():
    made = example()
    for one in (made.graph, made.graph.node[0], made.graph.input[0], made.graph.initializer[0]):
        one.metadata_props.add(key="trace", value="/home/me/model.py")
        one.doc_string = "/home/me/model.py"
    assert b"/home/me" in made.SerializeToString()
    assert b"/home/me" not in Graph(made).model().SerializeToString()
